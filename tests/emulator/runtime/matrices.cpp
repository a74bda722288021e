// Asynchronous copies into shared memory, and tensor cores: mma.sync, ldmatrix (layouts: PTX ISA, warp-level matrix
// instructions).
#include <cstring>

#include "ptx.h"
#include "scheduler.h"

namespace emulator {

void copy_async(unsigned char* to, const unsigned char* from, uint32_t bytes, uint32_t bytes_from) {
  memset(to, 0xff, bytes);
  self().copies.push_back({to, from, bytes, bytes_from, self().num_groups});
}

void commit_copies() { ++self().num_groups; }

void wait_for_copies(uint32_t pending_groups) {
  Fiber& me = self();
  auto kept = me.copies.begin();
  for (const Copy& copy : me.copies) {
    if (copy.group + pending_groups >= me.num_groups) {
      *kept++ = copy;
      continue;
    }
    memcpy(copy.to, copy.from, copy.bytes_from);
    memset(copy.to + copy.bytes_from, 0, copy.bytes - copy.bytes_from);
  }
  me.copies.erase(kept, me.copies.end());
}

namespace {

constexpr int kRows = 16, kColumns = 8, kMaxK = 32;

template <Element element>
struct Traits;
template <>
struct Traits<Element::f16> {
  static constexpr int per_register = 2;
  using Sum = double;
  static Sum element(uint32_t bits, int i) { return to_float<Half>(bits >> (16 * i)); }
};
template <>
struct Traits<Element::bf16> {
  static constexpr int per_register = 2;
  using Sum = double;
  static Sum element(uint32_t bits, int i) { return to_float<BFloat16>(bits >> (16 * i)); }
};
template <>
struct Traits<Element::tf32> {
  static constexpr int per_register = 1;
  using Sum = double;
  static Sum element(uint32_t bits, int) { return as<float>(bits & ~0x1fffu); }  // the rest is ignored
};
template <>
struct Traits<Element::s8> {
  static constexpr int per_register = 4;
  using Sum = int32_t;
  static Sum element(uint32_t bits, int i) { return static_cast<int8_t>(bits >> (8 * i)); }
};

template <class Sum>
Sum decode(uint32_t bits) {
  if constexpr (std::is_same_v<Sum, double>) return as<float>(bits);
  return static_cast<Sum>(bits);
}
template <class Sum>
uint32_t encode(Sum sum) {
  if constexpr (std::is_same_v<Sum, double>) return as<uint32_t>(static_cast<float>(sum));
  return static_cast<uint32_t>(sum);
}

// Floating point sums are rounded once, at the end; a card rounds them in an order and width of its own.
template <Element element>
void multiply_lanes(const Site& site, void** arguments, uint32_t lanes) {
  using T = Traits<element>;
  using Sum = typename T::Sum;
  if (lanes != ~0u) fail("%s at %s: only lanes %08x are there", site.what, site.source, lanes);
  const auto at = [&](int lane) -> Fragments& { return *static_cast<Fragments*>(arguments[lane]); };
  const int num_b = at(0).num_b, k_size = 4 * num_b * T::per_register;
  Sum a[kRows][kMaxK], b[kMaxK][kColumns];
  for (int lane = 0; lane < kWarp; ++lane) {
    const int group = lane / 4, k_begin = lane % 4 * T::per_register;
    for (int i = 0; i < T::per_register; ++i) {
      for (int r = 0; r < 2 * num_b; ++r) {
        a[group + r % 2 * 8][k_begin + i + r / 2 * 4 * T::per_register] = T::element(at(lane).a[r], i);
      }
      for (int r = 0; r < num_b; ++r) b[k_begin + i + r * 4 * T::per_register][group] = T::element(at(lane).b[r], i);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      Sum sum = decode<Sum>(at(lane).c[r]);
      for (int k = 0; k < k_size; ++k) sum += a[row][k] * b[k][column];
      at(lane).d[r] = encode(sum);
    }
  }
}

void load_lanes(const Site& site, void** arguments, uint32_t lanes) {
  if (lanes != ~0u) fail("%s at %s: only lanes %08x are there", site.what, site.source, lanes);
  const auto at = [&](int lane) -> MatrixLoad& { return *static_cast<MatrixLoad*>(arguments[lane]); };
  for (int matrix = 0; matrix < at(0).count; ++matrix) {
    const auto element = [&](int row, int column) -> uint32_t {
      return load<uint16_t>(at(matrix * 8 + row).row + 2 * column);
    };
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const bool t = at(lane).transposed;
      at(lane).registers[matrix] =
          t ? element(j, i) | element(j + 1, i) << 16 : element(i, j) | element(i, j + 1) << 16;
    }
  }
}

}  // namespace

void multiply(const Site& site, Element element, Fragments& fragments) {
  const LaneWork work = element == Element::f16    ? multiply_lanes<Element::f16>
                        : element == Element::bf16 ? multiply_lanes<Element::bf16>
                        : element == Element::tf32 ? multiply_lanes<Element::tf32>
                                                   : multiply_lanes<Element::s8>;
  meet(site, ~0u, &fragments, work);
}

void load_matrices(const Site& site, MatrixLoad& load) { meet(site, ~0u, &load, load_lanes); }

}  // namespace emulator
