// Tensor cores: mma.sync, ldmatrix (layouts: PTX ISA, warp-level matrix instructions).
#include "elements.h"

namespace emulator {

namespace {

constexpr int kRows = 16, kColumns = 8;

void check_all_are_there(const Operation& o, uint32_t lanes) {
  if (lanes != ~0u) fail("%s at %s: only lanes %08x are there", o.site->what, o.site->source, lanes);
}

}  // namespace

// D = A B + C. Inputs are the registers of A (two for each of B), B and C.
template <class T, int num_b>
void multiply(const Operation& o, uint32_t* const* slots, uint32_t lanes) {
  constexpr int kRegisters = 4 * num_b, kDepth = kRegisters * T::kPer;  // of a row of A or a column of B
  check_all_are_there(o, lanes);
  alignas(32) uint32_t a_bits[kRows][kRegisters], b_bits[kColumns][kRegisters], d[kRows][kColumns];
  for (int lane = 0; lane < kWarp; ++lane) {
    const uint32_t* mine = slots[lane];
    const int group = lane / 4, k = lane % 4;
    for (int r = 0; r < 2 * num_b; ++r) a_bits[group + r % 2 * 8][k + r / 2 * 4] = mine[o.inputs[r]];
    for (int r = 0; r < num_b; ++r) b_bits[group][k + r * 4] = mine[o.inputs[2 * num_b + r]];
    for (int r = 0; r < 4; ++r) d[group + r / 2 * 8][2 * k + r % 2] = mine[o.inputs[3 * num_b + r]];
  }
  alignas(32) float a[kRows][kDepth], b_transposed[kColumns][kDepth];
  T::decode(a_bits[0], kRows * kRegisters, a[0]);
  T::decode(b_bits[0], kColumns * kRegisters, b_transposed[0]);
  Floats b[kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int column = 0; column < kColumns; ++column) b[k][column] = b_transposed[column][k];
  }
  for (auto& row : d) add_products<T>(row, a[&row - d], b, 1, kDepth);
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) slots[lane][o.output + r] = d[lane / 4 + r / 2 * 8][lane % 4 * 2 + r % 2];
  }
}

// `count` matrices of 8 x 8 elements of 16 bits; a lane's input is where a row is in shared memory.
template <int count, bool is_transposed>
void load_matrices(const Operation& o, uint32_t* const* slots, uint32_t lanes) {
  check_all_are_there(o, lanes);
  for (int matrix = 0; matrix < count; ++matrix) {
    uint32_t rows[8][4];
    for (int row = 0; row < 8; ++row) memcpy(rows[row], block.smem + slots[matrix * 8 + row][o.inputs[0]], 16);
    const auto* halves = reinterpret_cast<const uint16_t (*)[8]>(rows);
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4;
      slots[lane][o.output + matrix] =
          is_transposed ? halves[2 * j][i] | static_cast<uint32_t>(halves[2 * j + 1][i]) << 16 : rows[i][j];
    }
  }
}

// The same way back; a lane's further inputs are its registers.
template <int count, bool is_transposed>
void store_matrices(const Operation& o, uint32_t* const* slots, uint32_t lanes) {
  check_all_are_there(o, lanes);
  for (int matrix = 0; matrix < count; ++matrix) {
    uint16_t rows[8][8];
    for (int lane = 0; lane < kWarp; ++lane) {
      const int i = lane / 4, j = lane % 4 * 2;
      const uint32_t bits = slots[lane][o.inputs[1 + matrix]];
      (is_transposed ? rows[j][i] : rows[i][j]) = static_cast<uint16_t>(bits);
      (is_transposed ? rows[j + 1][i] : rows[i][j + 1]) = static_cast<uint16_t>(bits >> 16);
    }
    for (int row = 0; row < 8; ++row) memcpy(block.smem + slots[matrix * 8 + row][o.inputs[0]], rows[row], 16);
  }
}

#define INSTANTIATE_PRODUCT(T)                                                \
  template void multiply<T, 1>(const Operation&, uint32_t* const*, uint32_t); \
  template void multiply<T, 2>(const Operation&, uint32_t* const*, uint32_t);
INSTANTIATE_PRODUCT(F16)
INSTANTIATE_PRODUCT(Bf16)
INSTANTIATE_PRODUCT(Tf32)
INSTANTIATE_PRODUCT(S8)
INSTANTIATE_PRODUCT(S8Saturating)

#define INSTANTIATE_LOAD(count)                                                             \
  template void load_matrices<count, false>(const Operation&, uint32_t* const*, uint32_t);  \
  template void load_matrices<count, true>(const Operation&, uint32_t* const*, uint32_t);   \
  template void store_matrices<count, false>(const Operation&, uint32_t* const*, uint32_t); \
  template void store_matrices<count, true>(const Operation&, uint32_t* const*, uint32_t);
INSTANTIATE_LOAD(1)
INSTANTIATE_LOAD(2)
INSTANTIATE_LOAD(4)

}  // namespace emulator
