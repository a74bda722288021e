#include "bulk_copies.h"

#include <cstring>

#include "async.h"
#include "mbarriers.h"
#include "ptx.h"
#include "races.h"
#include "scheduler.h"
#include "tensor_maps.h"

namespace emulator {

namespace {

constexpr uint32_t kChunk = 16;

void check_range(const Site& site, uint32_t offset, uint64_t bytes, uint32_t alignment) {
  check_alignment(site, offset, alignment);
  if (offset + bytes > block.smem_bytes) {
    fail("%s at %s: %lu bytes at offset %u are outside the block's %zu bytes of shared memory", site.what, site.source,
         bytes, offset, block.smem_bytes);
  }
}

TensorMap read_map(const Site& site, uint64_t address, int rank) {
  TensorMap map;
  memcpy(&map, to_host(reinterpret_cast<void*>(address)), sizeof map);
  if (map.mark != TensorMap::kMark) fail("%s at %s: there is no tensor map at 0x%lx", site.what, site.source, address);
  if (map.rank != rank) fail("%s at %s: the tensor map has %u dimensions", site.what, site.source, map.rank);
  return map;
}

// Calls f(offset in shared memory, address or 0 outside of the tensor, bytes) for each piece of a box.
template <class F>
void for_each_piece(const TensorMap& map, const Coordinates& coordinates, uint32_t offset, const F& f) {
  const uint32_t row_bytes = map.box[0] * map.element_bytes, rows = map.box_bytes() / row_bytes;
  for (uint32_t row = 0; row < rows; ++row) {
    uint64_t address = map.base;
    bool is_inside = true;
    for (uint32_t d = 1, rest = row; d < TensorMap::kMaxRank; rest /= map.box[d++]) {
      const int64_t x = coordinates.at[d] + static_cast<int64_t>(rest % map.box[d]);
      is_inside &= x >= 0 && x < static_cast<int64_t>(map.sizes[d]);
      address += x * map.strides[d];
    }
    for (uint32_t byte = 0; byte < row_bytes; byte += map.element_bytes) {
      const int64_t x = coordinates.at[0] + static_cast<int64_t>(byte / map.element_bytes);
      const bool is_there = is_inside && x >= 0 && x < static_cast<int64_t>(map.sizes[0]);
      const uint32_t at = offset + row * row_bytes + byte;
      f(swizzled(at, map.swizzle_bytes), is_there ? address + x * map.element_bytes : 0, map.element_bytes);
    }
  }
}

void begin(const Site& site, uint32_t offset, uint32_t bytes, bool writes) {
  if (settings.watches & kRaces) begin_transfer(site, Proxy::async, offset, bytes, writes);
  if (writes) memset(block.smem + offset, 0xff, bytes);
}

// Of a copy into shared memory.
void arrive(const Site& site, uint32_t offset, uint32_t bytes, uint32_t barrier) {
  if (settings.watches & kRaces) end_transfer(Proxy::async, offset, bytes, mbarrier_clock(site, barrier));
  mbarrier_complete(site, barrier, bytes);
}

template <class Run>
void start_store(Site& site, uint32_t from, uint32_t bytes, const Run& run) {
  begin(site, from, bytes, false);
  start_in_group(site, run, [=] {
    if (settings.watches & kRaces) end_transfer(Proxy::async, from, bytes);
  });
}

}  // namespace

void bulk_load(Site& site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier) {
  from = host_address(from);
  check_range(site, to, bytes, kChunk);
  check_alignment(site, from, kChunk);
  check_alignment(site, bytes, kChunk);
  check_bounds(site, from, bytes);
  mbarrier_check(site, barrier);
  count_global_access<Read>(site, from, bytes);
  begin(site, to, bytes, true);
  start_async(site, [=, &site] {
    memcpy(block.smem + to, reinterpret_cast<const void*>(from), bytes);
    arrive(site, to, bytes, barrier);
  });
}

void bulk_store(Site& site, uint64_t to, uint32_t from, uint32_t bytes) {
  to = host_address(to);
  check_range(site, from, bytes, kChunk);
  check_alignment(site, to, kChunk);
  check_alignment(site, bytes, kChunk);
  check_bounds(site, to, bytes);
  count_global_access<Write>(site, to, bytes);
  start_store(site, from, bytes, [=] { memcpy(reinterpret_cast<void*>(to), block.smem + from, bytes); });
}

void tensor_load(Site& site, uint32_t to, uint64_t address, int rank, Coordinates coordinates, uint32_t barrier) {
  const TensorMap map = read_map(site, address, rank);
  const uint32_t bytes = map.box_bytes();
  check_range(site, to, bytes, 128);
  mbarrier_check(site, barrier);
  for_each_piece(map, coordinates, to, [&](uint32_t, uint64_t from, uint32_t size) {
    from = host_address(from);
    if (!from) return;
    check_bounds(site, from, size);
    statistics.global_read += size;
  });
  begin(site, to, bytes, true);
  start_async(site, [=, &site] {
    for_each_piece(map, coordinates, to, [&](uint32_t offset, uint64_t from, uint32_t size) {
      if (from) {
        memcpy(block.smem + offset, to_host(reinterpret_cast<void*>(from)), size);
      } else {
        memset(block.smem + offset, map.fills_nan ? 0xff : 0, size);
      }
    });
    arrive(site, to, bytes, barrier);
  });
}

void tensor_store(Site& site, uint64_t address, int rank, Coordinates coordinates, uint32_t from) {
  const TensorMap map = read_map(site, address, rank);
  check_range(site, from, map.box_bytes(), 128);
  for_each_piece(map, coordinates, from, [&](uint32_t, uint64_t to, uint32_t size) {
    if (!to) return;
    check_bounds(site, host_address(to), size);
    count_global_access<Write>(site, host_address(to), size);
  });
  start_store(site, from, map.box_bytes(), [=] {
    for_each_piece(map, coordinates, from, [&](uint32_t offset, uint64_t to, uint32_t size) {
      if (to) memcpy(to_host(reinterpret_cast<void*>(to)), block.smem + offset, size);
    });
  });
}

}  // namespace emulator
