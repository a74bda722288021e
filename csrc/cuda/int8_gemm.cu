// Which kernel multiplies, with which tile and in how many parts of K.
#include "int8_gemm.cuh"
#include "int8_gemv.cuh"

namespace bigkern {

namespace {

// The sum over parts of K, [batch, part, M, N], four columns a thread: where there are fewer tiles than SMs.
constexpr int kFinishThreads = 256;
__global__ void __launch_bounds__(kFinishThreads)
    int8_finish_kernel(const __grid_constant__ Int8Epilogue p, const int32_t* parts, int num_parts, int64_t batch_size,
                       int64_t rows, int64_t cols) {
  const int64_t runs = ceil_div<int64_t>(cols, kColumns);
  const int64_t index = int64_t{blockIdx.x} * kFinishThreads + threadIdx.x;
  if (index >= batch_size * rows * runs) return;
  const int64_t j = index % runs * kColumns, i = index / runs % rows, batch = index / runs / rows;
  const int64_t columns_left = cols - j;
  int32_t sums[kColumns] = {};
  for (int part = 0; part < num_parts; ++part) {
    const int32_t* const from = parts + ((batch * num_parts + part) * rows + i) * cols + j;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) sums[c] += c < columns_left ? from[c] : 0;
  }
  const OutputRow place = OutputRows(p, i)(p, 0);
  finish(p, batch * p.batch + place.offset + j * p.col, columns_left, place.scale,
         load_factors(p, batch * cols + j, columns_left), sums);
}

// Larger tiles read less for each product: 8192^3 needs 24 bytes a cycle and SM of 128 x 256 tiles at the rate of mma,
// about what an H100's L2 cache gives. Smaller ones keep more SMs busy. The rates are relative, per SM.
using LargeTile = Int8Tile<128, 256, 2, 4, 4>;   // 96 kB, a block an SM
using MediumTile = Int8Tile<128, 128, 2, 2, 4>;  // 64 kB
using SmallTile = Int8Tile<64, 64, 2, 2, 6>;     // 48 kB

struct TileChoice {
  int block_m, block_n;
  double rate;
};
constexpr TileChoice kTiles[] = {{LargeTile::BLOCK_M, LargeTile::BLOCK_N, 1.0},
                                 {MediumTile::BLOCK_M, MediumTile::BLOCK_N, 0.85},
                                 {SmallTile::BLOCK_M, SmallTile::BLOCK_N, 0.5}};

struct Plan {
  int tile = 0, num_splits = 1;
  int64_t num_tiles = 0;
};

// The least time, in products of an SM at the highest rate. Parts of K have 512 bytes at least, and cost a launch
// (about 2 us) and the writing and reading of their sums (8 bytes at 3 TB/s are as long as 400 products).
Plan make_plan(const Int8Gemm& p, int num_sms) {
  constexpr double kLaunch = 8e6, kSum = 400;
  constexpr int64_t kLeastPart = 512, kMostSplits = 16;
  Plan best;
  double least = std::numeric_limits<double>::infinity();
  for (int t = p.is_im2col ? 1 : 0; t < static_cast<int>(std::size(kTiles)); ++t) {
    const TileChoice& tile = kTiles[t];
    const int64_t num_tiles = ceil_div<int64_t>(p.rows, tile.block_m) * ceil_div<int64_t>(p.cols, tile.block_n);
    for (int64_t splits = 1; splits <= kMostSplits && (splits == 1 || p.depth >= splits * kLeastPart); splits *= 2) {
      const int64_t waves = ceil_div<int64_t>(num_tiles * p.batch * splits, num_sms);
      double time = static_cast<double>(waves) * tile.block_m * tile.block_n * p.depth / splits / tile.rate;
      if (splits > 1) time += kLaunch + kSum * p.batch * p.rows * p.cols * splits / num_sms;
      if (time < least) {
        least = time;
        best = {t, static_cast<int>(splits), num_tiles};
      }
    }
  }
  return best;
}

int num_sms_of(Device device) {
  const torch::stable::accelerator::DeviceGuard guard(device.index);
  int current = 0, count = 0;
  STD_CUDA_CHECK(cudaGetDevice(&current));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, current));
  return count;
}

template <class Tile, Int8Layout kLayout>
void launch_gemm(const Int8Gemm& p, const Plan& plan, Device device) {
  const int64_t k_tiles = ceil_div<int64_t>(p.depth, BLOCK_K);
  const auto chunks_of_split = static_cast<int>(ceil_div<int64_t>(k_tiles, plan.num_splits) * kTileChunks);
  const dim3 grid = grid_of(plan.num_tiles * p.batch * plan.num_splits);
  launch(device.index, int8_gemm_kernel<Tile, kLayout>, grid, Tile::kThreads, Tile::kSmemBytes, p,
         static_cast<uint32_t>(plan.num_tiles), plan.num_splits, chunks_of_split);
}

template <Int8Layout kLayout>
void launch_gemm(const Int8Gemm& p, const Plan& plan, Device device) {
  if constexpr (kLayout != Int8Layout::kIm2col) {  // whose columns, output channels, are few
    if (plan.tile == 0) return launch_gemm<LargeTile, kLayout>(p, plan, device);
  }
  if (plan.tile == 1) return launch_gemm<MediumTile, kLayout>(p, plan, device);
  launch_gemm<SmallTile, kLayout>(p, plan, device);
}

void launch_gemm(const Int8Gemm& p, const Plan& plan, Device device) {
  if (p.is_im2col) return launch_gemm<Int8Layout::kIm2col>(p, plan, device);
  if (p.b_is_row_major) return launch_gemm<Int8Layout::kRowMajorB>(p, plan, device);
  launch_gemm<Int8Layout::kDense>(p, plan, device);
}

void launch_gemv(const Int8Gemm& p, Device device) {
  const int64_t blocks_of_entry = ceil_div<int64_t>(p.cols, kColumns);
  const auto run = [&](auto kernel) {
    launch(device.index, kernel, grid_of(blocks_of_entry * p.batch), kGemvThreads, 0, p,
           static_cast<uint32_t>(blocks_of_entry));
  };
  if (p.rows == 1) return run(int8_gemv_kernel<1>);
  if (p.rows == 2) return run(int8_gemv_kernel<2>);
  if (p.rows <= 4) return run(int8_gemv_kernel<4>);
  run(int8_gemv_kernel<kGemvMostRows>);
}

bool has_vectors(const Int8Epilogue& p) {
  const auto fits = [](int64_t stride) { return stride % kColumns == 0; };
  return p.col == 1 && fits(p.batch) && fits(p.image) && fits(p.row) &&
         reinterpret_cast<uintptr_t>(p.out) % (kColumns * element_size(p.dtype)) == 0;
}

}  // namespace

void int8_gemm(const Int8Gemm& problem, Device device) {
  Int8Gemm p = problem;
  if (p.batch == 0 || p.rows == 0 || p.cols == 0) return;
  p.epilogue.has_vectors = has_vectors(p.epilogue);
  if (p.rows <= kGemvMostRows && !p.is_im2col && !p.b_is_row_major) return launch_gemv(p, device);
  const Plan plan = make_plan(p, num_sms_of(device));
  if (plan.num_splits == 1) return launch_gemm(p, plan, device);

  const torch::stable::Device on(static_cast<torch::headeronly::DeviceType>(device.type), device.index);
  const Tensor parts = torch::stable::empty({p.batch, plan.num_splits, p.rows, p.cols}, ScalarType::Int, {}, on);
  const Int8Epilogue epilogue = p.epilogue;
  p.epilogue = {};
  p.epilogue.out = parts.data_ptr();
  p.epilogue.image_rows = p.rows;
  p.epilogue.row = p.cols;
  p.epilogue.batch = p.rows * p.cols;
  p.epilogue.has_vectors = has_vectors(p.epilogue);
  launch_gemm(p, plan, device);
  const int64_t threads = p.batch * p.rows * ceil_div<int64_t>(p.cols, kColumns);
  launch(device.index, int8_finish_kernel, grid_of(ceil_div<int64_t>(threads, kFinishThreads)), kFinishThreads, 0,
         epilogue, static_cast<const int32_t*>(parts.data_ptr()), plan.num_splits, p.batch, p.rows, p.cols);
}

}  // namespace bigkern
