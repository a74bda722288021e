// Reductions over a warp, and the device's runtime.
#pragma once

#include "ptx.h"

namespace emulator {

enum class Reduce { add_, min_, max_, and_, or_, xor_ };

template <class T>
inline T warp_reduce(const Site& site, Reduce kind, uint32_t mask, T value) {
  struct Lane {
    T value, result;
    Reduce kind;
  } lane{value, 0, kind};
  meet(site, mask, &lane, [](const Site&, void** arguments, uint32_t lanes) {
    const auto at = [&](int i) { return static_cast<Lane*>(arguments[i]); };
    const int first = __builtin_ctz(lanes);
    T result = at(first)->value;
    for (int i = first + 1; i < kWarp; ++i) {
      if (!(lanes >> i & 1)) continue;
      const T x = at(i)->value;
      switch (at(first)->kind) {
        case Reduce::add_: result = static_cast<T>(static_cast<uint64_t>(result) + x); break;
        case Reduce::min_: result = std::min(result, x); break;
        case Reduce::max_: result = std::max(result, x); break;
        case Reduce::and_: result &= x; break;
        case Reduce::or_: result |= x; break;
        case Reduce::xor_: result ^= x; break;
      }
    }
    for (int i = first; i < kWarp; ++i) {
      if (lanes >> i & 1) at(i)->result = result;
    }
  });
  return lane.result;
}

// What kernels call; each argument is a pointer to its value.
void device_vprintf(unsigned char* result, unsigned char* text, unsigned char* arguments);
[[noreturn]] void device_assertfail(unsigned char* message, unsigned char* file, unsigned char* line,
                                    unsigned char* function, unsigned char* char_size);

}  // namespace emulator
