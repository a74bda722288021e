// All that translated code asks for.
#pragma once

#include "async_stores.h"
#include "bulk_copies.h"
#include "mbarriers.h"
#include "ptx.h"
#include "races.h"
#include "warpgroups.h"

namespace emulator {

inline void proxy_fence() {
  if (settings.watches & kRaces) fence_proxy();
}

}  // namespace emulator
