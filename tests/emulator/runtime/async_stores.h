// st.async and red.async: a thread's values for another block, whose mbarrier counts their bytes when they are there.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

void store_async(Site& site, uint32_t to, const void* values, uint32_t bytes, uint32_t barrier);
using ValueUpdate = void (*)(unsigned char* p, uint64_t value);
void reduce_async(Site& site, uint32_t to, ValueUpdate update, uint64_t value, uint32_t bytes, uint32_t barrier);

}  // namespace emulator
#pragma GCC visibility pop
