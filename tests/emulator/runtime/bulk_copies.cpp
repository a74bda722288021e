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

constexpr uint32_t kChunk = 16, kBoxAlignment = 128;

uint32_t find_aligned(const Site& site, uint32_t address, uint64_t bytes, uint32_t alignment) {
  check_alignment(site, address, alignment);
  return find_place(site, address, bytes);
}

uint32_t find_own(const Site& site, uint32_t address, uint64_t bytes, uint32_t alignment) {
  return find_aligned(site, check_own(site, address), bytes, alignment);
}

TensorMap read_map(const Site& site, uint64_t address, int rank) {
  TensorMap map;
  memcpy(&map, to_host(reinterpret_cast<void*>(address)), sizeof map);
  if (map.mark != TensorMap::kMark) fail("%s at %s: there is no tensor map at 0x%lx", site.what, site.source, address);
  if (map.rank != rank) fail("%s at %s: the tensor map has %u dimensions", site.what, site.source, map.rank);
  return map;
}

// Calls f(place in shared memory, address or 0 outside of the tensor, bytes) for each piece of a box.
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

void begin(const Site& site, uint32_t place, uint32_t bytes, bool writes) {
  if (settings.watches & kRaces) begin_transfer(site, By::async_proxy, place, bytes, writes);
  if (writes) memset(cluster.smem + place, 0xff, bytes);
}

std::vector<Target> find_targets(Site& site, uint32_t to, uint32_t bytes, uint32_t alignment, uint32_t barrier,
                                 int multicast) {
  if (multicast == kNoMulticast) return {find_target(site, to, bytes, alignment, barrier)};
  std::vector<Target> targets;
  for (uint32_t rank = 0; multicast >> rank; ++rank) {
    if (!(multicast >> rank & 1)) continue;
    const uint32_t there = map_shared(site, to, rank), barrier_there = map_shared(site, barrier, rank);
    targets.push_back(find_target(site, there, bytes, alignment, barrier_there));
  }
  if (targets.empty()) fail("%s at %s: its mask names no block", site.what, site.source);
  return targets;
}

// `fill` writes to a place. Each block's bytes come at a time of their own.
template <class Fill>
void start_loads(const Site& site, const std::vector<Target>& targets, uint32_t bytes, const Fill& fill) {
  for (const Target& target : targets) begin(site, target.place, bytes, true);
  for (const Target& target : targets) {
    start_async(site, [=, &site] {
      check_is_live(site, target.place);
      fill(target.place);
      arrive(site, By::async_proxy, target, bytes);
    });
  }
}

template <class Run>
void start_store(Site& site, uint32_t from, uint32_t bytes, const Run& run) {
  begin(site, from, bytes, false);
  start_in_group(site, run, [=] {
    if (settings.watches & kRaces) end_transfer(By::async_proxy, from, bytes);
  });
}

}  // namespace

void bulk_load(Site& site, uint32_t to, uint64_t from, uint32_t bytes, uint32_t barrier, int multicast) {
  from = host_address(from);
  check_alignment(site, from, kChunk);
  check_alignment(site, bytes, kChunk);
  check_bounds(site, from, bytes);
  const auto targets = find_targets(site, to, bytes, kChunk, barrier, multicast);
  count_global_access<Read>(site, from, bytes);
  start_loads(site, targets, bytes,
              [=](uint32_t place) { memcpy(cluster.smem + place, reinterpret_cast<const void*>(from), bytes); });
}

void bulk_store(Site& site, uint64_t to, uint32_t from, uint32_t bytes) {
  to = host_address(to);
  const uint32_t place = find_own(site, from, bytes, kChunk);
  check_alignment(site, to, kChunk);
  check_alignment(site, bytes, kChunk);
  check_bounds(site, to, bytes);
  count_global_access<Write>(site, to, bytes);
  start_store(site, place, bytes, [=] { memcpy(reinterpret_cast<void*>(to), cluster.smem + place, bytes); });
}

void bulk_send(Site& site, uint32_t to, uint32_t from, uint32_t bytes, uint32_t barrier) {
  const uint32_t source = find_own(site, from, bytes, kChunk);
  check_alignment(site, bytes, kChunk);
  const Target target = find_target(site, to, bytes, kChunk, barrier);
  begin(site, source, bytes, false);
  start_loads(site, {target}, bytes, [=, &site](uint32_t place) {
    check_is_live(site, source);
    memcpy(cluster.smem + place, cluster.smem + source, bytes);
    if (settings.watches & kRaces) end_transfer(By::async_proxy, source, bytes, mbarrier_clock(site, target.barrier));
  });
}

void tensor_load(Site& site, uint32_t to, uint64_t address, int rank, Coordinates coordinates, uint32_t barrier,
                 int multicast) {
  const TensorMap map = read_map(site, address, rank);
  const uint32_t bytes = map.box_bytes();
  const auto targets = find_targets(site, to, bytes, kBoxAlignment, barrier, multicast);
  for_each_piece(map, coordinates, 0, [&](uint32_t, uint64_t from, uint32_t size) {
    from = host_address(from);
    if (!from) return;
    check_bounds(site, from, size);
    statistics.global_read += size;
  });
  start_loads(site, targets, bytes, [=](uint32_t begin) {
    for_each_piece(map, coordinates, begin, [&](uint32_t place, uint64_t from, uint32_t size) {
      if (from) {
        memcpy(cluster.smem + place, to_host(reinterpret_cast<void*>(from)), size);
      } else {
        memset(cluster.smem + place, map.fills_nan ? 0xff : 0, size);
      }
    });
  });
}

void tensor_store(Site& site, uint64_t address, int rank, Coordinates coordinates, uint32_t from) {
  const TensorMap map = read_map(site, address, rank);
  const uint32_t source = find_own(site, from, map.box_bytes(), kBoxAlignment);
  for_each_piece(map, coordinates, source, [&](uint32_t, uint64_t to, uint32_t size) {
    if (!to) return;
    check_bounds(site, host_address(to), size);
    count_global_access<Write>(site, host_address(to), size);
  });
  start_store(site, source, map.box_bytes(), [=] {
    for_each_piece(map, coordinates, source, [&](uint32_t place, uint64_t to, uint32_t size) {
      if (to) memcpy(to_host(reinterpret_cast<void*>(to)), cluster.smem + place, size);
    });
  });
}

}  // namespace emulator
