// float16 and bfloat16, which registers hold as bits.
#pragma once

#include <immintrin.h>

#include "ptx.h"

namespace emulator {

struct Half {
  static constexpr int kMantissa = 10, kMaxExponent = 15, kMinExponent = -14;
};
struct BFloat16 {
  static constexpr int kMantissa = 7, kMaxExponent = 127, kMinExponent = -126;
};

template <class H>
inline float to_float(uint16_t bits) {
  return std::is_same_v<H, BFloat16> ? as<float>(static_cast<uint32_t>(bits) << 16) : _cvtsh_ss(bits);
}

// Rounds a double, in which a float is exact, by `round`: nearbyint (to even) or trunc.
template <class H>
inline uint16_t round_to_half(double x, double (*round)(double), bool overflows) {
  constexpr uint32_t kInfinity = (2u * H::kMaxExponent + 1) << H::kMantissa;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  if (x != x) return 0x7fff;
  if (magnitude == INFINITY) return sign | kInfinity;
  const int exponent = std::max(magnitude > 0 ? std::ilogb(magnitude) : H::kMinExponent, H::kMinExponent);
  // In units of the last place; a carry moves on to the next exponent by itself.
  const auto units = static_cast<uint64_t>(round(std::ldexp(magnitude, H::kMantissa - exponent)));
  const uint64_t bits = (static_cast<uint64_t>(exponent - H::kMinExponent) << H::kMantissa) + units;
  return sign | (bits < kInfinity ? bits : overflows ? kInfinity : kInfinity - 1);
}

template <class H>
inline uint16_t to_half(double x) {
  return round_to_half<H>(x, std::nearbyint, true);
}

template <class H>
inline uint16_t to_half(float x) {
  if (x != x) return 0x7fff;
  if (std::is_same_v<H, Half>) return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT);
  const auto bits = as<uint32_t>(x);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

template <class H>
inline uint16_t to_half_toward_zero(double x) {
  return round_to_half<H>(x, std::trunc, false);
}

// a * b + c in double, rounded to odd, so that rounding it once more is as good as rounding once.
inline double fma_to_odd(double a, double b, double c) {
  const double product = a * b, sum = product + c;  // the product of two halves is exact
  const double back = sum - product, error = (product - (sum - back)) + (c - back);
  if (error == 0 || !std::isfinite(sum) || (as<uint64_t>(sum) & 1)) return sum;
  return std::nextafter(sum, error > 0 ? INFINITY : -INFINITY);
}

// f for each of the halves that T holds.
template <class H, int width, class T, class F, class... More>
inline T each_half(const F& f, More... operands) {
  T result = 0;
  for (int i = 0; i < width; ++i) {
    result |= static_cast<T>(to_half<H>(f(to_float<H>(static_cast<uint16_t>(operands >> (16 * i)))...))) << (16 * i);
  }
  return result;
}

template <class H, int width, class T>
inline T half_add(T a, T b) {
  return each_half<H, width, T>([](double x, double y) { return fma_to_odd(x, 1, y); }, a, b);
}
template <class H, int width, class T>
inline T half_sub(T a, T b) {
  return each_half<H, width, T>([](double x, double y) { return fma_to_odd(x, 1, -y); }, a, b);
}
template <class H, int width, class T>
inline T half_mul(T a, T b) {
  return each_half<H, width, T>([](double x, double y) { return x * y; }, a, b);
}
template <class H, int width, class T>
inline T half_fma(T a, T b, T c) {
  return each_half<H, width, T>(fma_to_odd, a, b, c);
}
template <class H, int width, class T>
inline T half_min(T a, T b) {
  return each_half<H, width, T>(float_min<double>, a, b);
}
template <class H, int width, class T>
inline T half_max(T a, T b) {
  return each_half<H, width, T>(float_max<double>, a, b);
}
template <class H, int width, class T>
inline T half_neg(T a) {
  return a ^ static_cast<T>(0x80008000u);
}
template <class H, int width, class T>
inline T half_abs(T a) {
  return a & static_cast<T>(0x7fff7fffu);
}

}  // namespace emulator
