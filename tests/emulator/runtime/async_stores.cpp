#include "async_stores.h"

#include <cstring>
#include <functional>
#include <string>

#include "async.h"
#include "clusters.h"
#include "mbarriers.h"
#include "races.h"

namespace emulator {

namespace {

enum class Kind { store, reduction };

// `write` does it; until then, what is stored over is NaN.
void start(Site& site, Kind kind, uint32_t to, uint32_t bytes, uint32_t barrier,
           std::function<void(unsigned char*)> write) {
  const Target target = find_target(site, to, bytes, bytes, barrier);
  const bool is_atomic = kind == Kind::reduction;
  if (settings.watches & kRaces) begin_transfer(site, By::unit, target.place, bytes, true, is_atomic);
  if (kind == Kind::store) memset(cluster.smem + target.place, 0xff, bytes);
  start_async(site, [=, &site] {
    check_is_live(site, target.place);
    write(cluster.smem + target.place);
    arrive(site, By::unit, target, bytes);
  });
}

}  // namespace

void store_async(Site& site, uint32_t to, const void* values, uint32_t bytes, uint32_t barrier) {
  const std::string copy(static_cast<const char*>(values), bytes);
  start(site, Kind::store, to, bytes, barrier, [=](unsigned char* p) { memcpy(p, copy.data(), bytes); });
}

void reduce_async(Site& site, uint32_t to, ValueUpdate update, uint64_t value, uint32_t bytes, uint32_t barrier) {
  start(site, Kind::reduction, to, bytes, barrier, [=](unsigned char* p) { update(p, value); });
}

}  // namespace emulator
