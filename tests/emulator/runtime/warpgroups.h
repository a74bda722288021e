// wgmma: products of four warps, which go on beside their threads.
#pragma once

#include "emulator.h"

#pragma GCC visibility push(hidden)
namespace emulator {

// D [64, N] = A [64, K] @ B [K, N] (+ D), K of 32 bytes, as one thread asks for it. Its registers are read and written
// when the product is done, which may be late: until it is waited for, those of D hold NaN.
struct Product {
  uint32_t* const* d;
  int n;
  uint32_t* const* a;  // null: `a_matrix` is it
  uint64_t a_matrix, b_matrix;
  bool accumulates, a_transposed, b_transposed;
  int a_sign, b_sign;
};

// `sums`: of each thread, what its registers of D hold truly.
using ProductWork = void (*)(const Site& site, const Product* products, uint32_t* const* sums);
template <class Element>
void multiply_warpgroup(const Site& site, const Product* products, uint32_t* const* sums);

void start_product(const Site& site, ProductWork work, const Product& product);
void fence_products();
void commit_products();
void wait_for_products(const Site& site, uint32_t pending_groups);

// Where an element of a matrix is in shared memory, by its descriptor; row: of A, or column of B.
uint32_t matrix_offset(const Site& site, uint64_t descriptor, bool is_transposed, int row, int k, int element_bytes);

}  // namespace emulator
#pragma GCC visibility pop
