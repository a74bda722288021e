// Many tensors in one launch: a table of them travels by value with the launch, and each block takes a chunk of one.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "launch.cuh"
#include "vector.cuh"

namespace bigkern {

constexpr int kThreads = 256;                          // a block
constexpr int kTableBytes = kMaxParameterBytes - 256;  // the rest is for the other parameters and for padding

// Elements [begin, begin + size) of one tensor: the work of a block.
struct Chunk {
  int tensor;
  int64_t begin;
  int size;
};

constexpr int kChunkBytes = sizeof(int64_t) + sizeof(int32_t);  // of a ChunkTable, for each tensor

// Cuts tensors into chunks. That a launch has less than 2^31 of them holds for all that fits into a GPU's memory.
template <int kCapacity>
struct ChunkTable {
  int64_t numel[kCapacity];
  int32_t first_chunk[kCapacity];  // the number of chunks before each tensor
  int32_t num_tensors = 0, num_chunks = 0;

  void add(int64_t tensor_numel, int chunk_size) {
    numel[num_tensors] = tensor_numel;
    first_chunk[num_tensors++] = num_chunks;
    num_chunks += static_cast<int32_t>(ceil_div<int64_t>(tensor_numel, chunk_size));
  }

  // The last tensor that starts at or before this chunk: an empty one starts where its successor does.
  __device__ Chunk find(int chunk, int chunk_size) const {
    int tensor = 0;
    for (int end = num_tensors; end - tensor > 1;) {
      const int middle = (tensor + end) / 2;
      (first_chunk[middle] <= chunk ? tensor : end) = middle;
    }
    const int64_t begin = static_cast<int64_t>(chunk - first_chunk[tensor]) * chunk_size;
    return {tensor, begin, static_cast<int>(min(numel[tensor] - begin, static_cast<int64_t>(chunk_size)))};
  }
};

// ---- Host ----

// Mostly all keys are equal, and then nothing moves: std::stable_sort would take 100 us for 2,000 tensors even so.
template <class Item, class Key>
void sort_by(std::vector<Item>& items, const Key& key) {
  const auto less = [&](const Item& a, const Item& b) { return key(a) < key(b); };
  if (!std::is_sorted(items.begin(), items.end(), less)) std::stable_sort(items.begin(), items.end(), less);
}

// Calls f(begin, end) for each run of items with equal keys.
template <class Item, class Key, class F>
void for_each_run(const std::vector<Item>& items, const Key& key, const F& f) {
  const Item* const last = items.data() + items.size();
  for (const Item *begin = items.data(), *end; begin != last; begin = end) {
    end = std::find_if(begin, last, [&](const Item& item) { return key(item) != key(*begin); });
    f(begin, end);
  }
}

}  // namespace bigkern
