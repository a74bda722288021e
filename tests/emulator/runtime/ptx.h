// What translated kernels are written in: checked pointers, and the instructions that C++ has no operator for.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "clusters.h"

namespace emulator {

template <class To, class From>
inline To as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
inline T load(const unsigned char* p) {
  T value;
  memcpy(&value, p, sizeof value);
  return value;
}

template <class T>
inline void store(unsigned char* p, T value) {
  memcpy(p, &value, sizeof value);
}

// ---- Checked pointers ----

struct Read {
  static constexpr bool reads = true, writes = false, is_atomic = false;
};
struct Write {
  static constexpr bool reads = false, writes = true, is_atomic = false;
};
// Those that may race with one another: volatile and what has a memory order.
struct StrongRead {
  static constexpr bool reads = true, writes = false, is_atomic = true;
};
struct StrongWrite {
  static constexpr bool reads = false, writes = true, is_atomic = true;
};
struct Update {
  static constexpr bool reads = true, writes = true, is_atomic = true;
};

template <class Access>
inline void watch(Site& site, bool is_shared, uint64_t address, uint32_t bytes) {
  if (__builtin_expect(settings.watches == 0, 1)) return;
  watch_access(site, is_shared, address, bytes, Access::reads, Access::writes, Access::is_atomic);
}

inline void fence() {
  if (settings.watches & kRaces) fence_threads();
}

inline void check_alignment(const Site& site, uint64_t address, size_t bytes) {
  if (__builtin_expect(address % bytes != 0, 0)) {
    fail("%s at %s: address 0x%lx isn't a multiple of %zu bytes", site.what, site.source, address, bytes);
  }
}

// The site remembers the buffer that it found.
inline void check_bounds(Site& site, uint64_t address, size_t bytes) {
  const uintptr_t offset = address - site.begin;
  if (__builtin_expect(site.epoch != buffer_epoch || offset > site.size || site.size - offset < bytes, 0)) {
    find_buffer(site, address, bytes);
  }
}

template <class Access>
inline void count_global_access(Site& site, uint64_t address, size_t bytes) {
  if (Access::reads) statistics.global_read += bytes;
  if (Access::writes) statistics.global_written += bytes;
  watch<Access>(site, false, address, bytes);
}

template <class Access, size_t bytes>
inline unsigned char* global_pointer(Site& site, uint64_t address) {
  address = host_address(address);
  check_alignment(site, address, bytes);
  check_bounds(site, address, bytes);
  count_global_access<Access>(site, address, bytes);
  return reinterpret_cast<unsigned char*>(address);
}

// Of an access of `size` bytes that reads `bytes` of them, maybe none.
template <size_t size>
inline unsigned char* partial_global_pointer(Site& site, uint64_t address, size_t bytes) {
  address = host_address(address);
  if (bytes > size) fail("%s at %s: %zu bytes of %zu", site.what, site.source, bytes, size);
  if (bytes > 0) {
    check_alignment(site, address, size);
    check_bounds(site, address, bytes);
    count_global_access<Read>(site, address, bytes);
  }
  return reinterpret_cast<unsigned char*>(address);
}

template <class Access, size_t bytes>
inline unsigned char* const_pointer(Site& site, uint64_t address) {
  return global_pointer<Access, bytes>(site, address);
}

template <class Access, size_t bytes>
inline unsigned char* shared_pointer(Site& site, uint32_t offset) {
  check_alignment(site, offset, bytes);
  if (__builtin_expect(static_cast<uint64_t>(offset) + bytes > block.smem_bytes, 0)) {
    fail("%s at %s: %zu bytes at offset %u are outside the block's %zu bytes of shared memory", site.what, site.source,
         bytes, offset, block.smem_bytes);
  }
  if (__builtin_expect(settings.watches != 0, 0)) watch<Access>(site, true, place_of(offset), bytes);
  return block.smem + offset;
}

// Of any block of the cluster.
template <class Access, size_t bytes>
inline unsigned char* cluster_pointer(Site& site, uint32_t address) {
  check_alignment(site, address, bytes);
  const uint32_t place = find_place(site, address, bytes);
  watch<Access>(site, true, place, bytes);
  return cluster.smem + place;
}

template <class Access, size_t bytes>
inline unsigned char* generic_pointer(Site& site, uint64_t address) {
  const uint64_t offset = address - reinterpret_cast<uint64_t>(block.smem);
  if (offset < block.smem_bytes) return shared_pointer<Access, bytes>(site, offset);
  if (is_in_cluster(address)) return cluster_pointer<Access, bytes>(site, to_shared(address));
  if (!is_private(address, bytes)) return global_pointer<Access, bytes>(site, address);
  check_alignment(site, address, bytes);
  return reinterpret_cast<unsigned char*>(address);
}

template <class Access, size_t bytes>
inline unsigned char* local_pointer(Site& site, uint64_t address) {
  check_alignment(site, address, bytes);
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(current->stack);
  if (offset > kStackBytes - bytes) fail("%s at %s: address outside local memory", site.what, site.source);
  return reinterpret_cast<unsigned char*>(address);
}

template <class Access, size_t bytes>
inline unsigned char* param_pointer(Site& site, uint64_t address) {
  const uintptr_t offset = address - reinterpret_cast<uintptr_t>(block.parameters);
  if (offset + bytes > block.kernel->parameter_bytes) {
    fail("%s at %s: %zu bytes at offset %ld are outside the kernel's %zu bytes of parameters", site.what, site.source,
         bytes, static_cast<long>(offset), block.kernel->parameter_bytes);
  }
  return reinterpret_cast<unsigned char*>(address);
}

// ---- Integers ----

template <class T>
inline T div_checked(const Site& site, T a, T b) {
  if (b == 0) fail("%s at %s: division by zero", site.what, site.source);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return static_cast<T>(0 - static_cast<uint64_t>(a));
  }
  return a / b;
}

template <class T>
inline T rem_checked(const Site& site, T a, T b) {
  if (b == 0) fail("%s at %s: division by zero", site.what, site.source);
  if constexpr (std::is_signed_v<T>) {
    if (b == -1) return 0;
  }
  return a % b;
}

template <class T>
inline T shl(T a, uint32_t n) {
  return n >= sizeof(T) * 8 ? T(0) : T(std::make_unsigned_t<T>(a) << n);
}

template <class T>
inline T shr(T a, uint32_t n) {
  return T(a >> std::min<uint32_t>(n, sizeof(T) * 8 - 1)) >> (n >= sizeof(T) * 8);
}

template <class T>
inline uint32_t popc(T a) {
  return __builtin_popcountll(a);
}

template <class T>
inline uint32_t clz(T a) {
  return a ? __builtin_clzll(a) - (64 - sizeof(T) * 8) : sizeof(T) * 8;
}

template <class T>
inline T brev(T a) {
  T result = 0;
  for (size_t i = 0; i < sizeof(T) * 8; ++i) result = T(result << 1) | (a >> i & 1);
  return result;
}

// `length` bits of a from bit `begin` on; the sign is that of the highest bit, or of a's where the field leaves it.
template <class T>
inline T bfe(T a, uint32_t begin, uint32_t length) {
  constexpr uint32_t kBits = sizeof(T) * 8;
  begin &= 255;
  length &= 255;
  if (length == 0) return 0;
  const T shifted = shr(a, begin);
  if (begin + length >= kBits) return shifted;
  return shr(shl(shifted, kBits - length), kBits - length);
}

template <class T>
inline T bfi(T field, T a, uint32_t begin, uint32_t length) {
  begin &= 255;
  length &= 255;
  const T mask = shl(T(shl(T(1), length) - 1), begin);
  return (a & ~mask) | (shl(field, begin) & mask);
}

inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int i = 0; i < 8; ++i) {
    if (table >> i & 1) result |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  }
  return result;
}

// Each byte of the result is one of 8, or that one's sign.
inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t select = selector >> (4 * i) & 15;
    uint8_t byte = bytes >> (8 * (select & 7));
    if (select & 8) byte = byte & 0x80 ? 0xff : 0;
    result |= static_cast<uint32_t>(byte) << (8 * i);
  }
  return result;
}

template <class A, class B>
inline uint32_t dp4a(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += static_cast<A>(a >> (8 * i)) * static_cast<B>(b >> (8 * i));
  return c;
}

// ---- Floating point ----

template <class T>
inline T flush(T x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(T(0), x) : x;
}

inline double coarse(double x) { return as<double>(as<uint64_t>(x) & ~0xffffffffull); }

// 10 bits of mantissa, rounded to nearest, ties away from 0.
inline uint32_t to_tf32(float x) {
  const auto bits = as<uint32_t>(x);
  return std::isfinite(x) ? (bits + 0x1000u) & ~0x1fffu : bits;
}

template <class T>
inline T saturate(T x) {
  return x > 0 ? std::min(x, T(1)) : T(0);  // NaN too becomes 0
}

// The other operand where one is NaN; -0 is less than 0.
template <class T>
inline T float_min(T a, T b) {
  if (a == b) return std::signbit(a) ? a : b;
  return std::fmin(a, b);
}
template <class T>
inline T float_max(T a, T b) {
  if (a == b) return std::signbit(a) ? b : a;
  return std::fmax(a, b);
}
template <class T>
inline T float_min_nan(T a, T b) {
  return a != a ? a : b != b ? b : float_min(a, b);
}
template <class T>
inline T float_max_nan(T a, T b) {
  return a != a ? a : b != b ? b : float_max(a, b);
}

template <class T, class Float>
inline T to_integer(Float x) {
  if (x != x) return sizeof(T) == 8 || sizeof(Float) == 8 ? T(1ull << (sizeof(T) * 8 - 1)) : T(0);
  if (x <= static_cast<Float>(std::numeric_limits<T>::lowest())) return std::numeric_limits<T>::lowest();
  if (x >= static_cast<Float>(std::numeric_limits<T>::max())) return std::numeric_limits<T>::max();
  return static_cast<T>(x);
}

template <class T, class Integer>
inline T clamp(Integer x) {
  const __int128 low = std::numeric_limits<T>::lowest(), high = std::numeric_limits<T>::max();
  return static_cast<T>(std::min(std::max(static_cast<__int128>(x), low), high));
}

}  // namespace emulator

#include "ptx_half.h"
#include "ptx_warp.h"
