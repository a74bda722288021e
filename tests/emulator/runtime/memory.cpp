// Known memory: tensors, what cudaMalloc gave, variables of modules.
#include <algorithm>
#include <map>
#include <mutex>

#include "scheduler.h"

namespace emulator {

uint64_t buffer_epoch = 1;

namespace {

struct Buffer {
  size_t bytes;
  std::string name;
  int owners;
};

using Buffers = std::multimap<uintptr_t, Buffer>;

// Made at the first use: modules register before this file's variables are.
Buffers& buffers() {
  static auto* all = new Buffers;
  return *all;
}
std::mutex& mutex() {
  static auto* it = new std::mutex;
  return *it;
}

// Buffers may overlap, as views do: the search goes back from the last that starts at or before the address.
const Buffers::value_type* holder(uintptr_t address, size_t bytes) {
  const Buffers& all = buffers();
  for (auto it = all.upper_bound(address); it != all.begin();) {
    --it;
    const uintptr_t offset = address - it->first;
    if (offset <= it->second.bytes && it->second.bytes - offset >= bytes) return &*it;
  }
  return nullptr;
}

std::string nearest(uintptr_t address, size_t bytes) {
  std::string text = "no known buffer is near";
  uintptr_t least = 1 << 20;
  for (const auto& [begin, buffer] : buffers()) {
    const uintptr_t end = begin + buffer.bytes;
    const bool is_before = address < begin;
    const uintptr_t distance = is_before ? begin - address : address + bytes > end ? address + bytes - end : 0;
    if (distance >= least) continue;
    least = distance;
    text = format("it %s %lu bytes %s of %zu bytes", is_before ? "begins" : "ends", distance,
                  ((is_before ? "before " : "after the end of ") + buffer.name).c_str(), buffer.bytes);
  }
  return text;
}

}  // namespace

void add_buffer(const void* begin, size_t bytes, const std::string& name) {
  const std::lock_guard<std::mutex> lock(mutex());
  buffers().emplace(reinterpret_cast<uintptr_t>(begin), Buffer{bytes, name, 1});
  ++buffer_epoch;
}

bool remove_buffer(const void* begin) {
  const std::lock_guard<std::mutex> lock(mutex());
  const auto it = buffers().find(reinterpret_cast<uintptr_t>(begin));
  if (it == buffers().end()) return false;
  buffers().erase(it);
  ++buffer_epoch;
  return true;
}

void find_buffer(Site& site, uintptr_t address, size_t bytes) {
  std::unique_lock<std::mutex> lock(mutex());
  if (const auto* found = holder(address, bytes)) {
    site.begin = found->first;
    site.size = found->second.bytes;
    site.epoch = buffer_epoch;
    return;
  }
  const std::string text = nearest(address, bytes);
  lock.unlock();
  fail("%s at %s: %zu bytes at address 0x%lx are in no known buffer: %s", site.what, site.source, bytes, address,
       text.c_str());
}

bool is_in_buffer(const void* begin, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex());
  return bytes == 0 || holder(reinterpret_cast<uintptr_t>(begin), bytes);
}

bool is_private(uintptr_t address, size_t bytes) {
  const auto is_in = [&](const unsigned char* begin, size_t size) {
    const uintptr_t offset = address - reinterpret_cast<uintptr_t>(begin);
    return offset <= size && size - offset >= bytes;
  };
  return is_in(block.parameters, block.kernel->parameter_bytes) || is_in(current->stack, kStackBytes);
}

}  // namespace emulator
