// cuTensorMapEncodeTiled, and how the runtime hands it out.
#include <cuda.h>

#include <cstring>

#include "cuda.h"
#include "tensor_maps.h"

using namespace emulator;

namespace {

constexpr int kElementBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType
constexpr int kSwizzleBytes[] = {0, 32, 64, 128};                         // by CUtensorMapSwizzle

}  // namespace

extern "C" {
// The conditions are those of the driver API's documentation.
CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const auto is_misaligned = [](const void* p, int bytes) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ) not_emulated("a tensor map of this type");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) not_emulated("an interleaved tensor map");
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) not_emulated("this swizzle of a tensor map");
  const bool is_there = map && sizes && box && element_strides && (rank == 1 || strides);
  if (rank < 1 || rank > 5 || !is_there || is_misaligned(map, 64) || is_misaligned(base, 16)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  TensorMap t = {reinterpret_cast<uint64_t>(base), {1, 1, 1, 1, 1}, {}, {1, 1, 1, 1, 1}};
  t.rank = rank;
  t.element_bytes = kElementBytes[type];
  t.swizzle_bytes = kSwizzleBytes[swizzle];
  t.fills_nan = fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  t.mark = TensorMap::kMark;
  for (uint32_t d = 0; d < rank; ++d) {
    const uint64_t stride = d == 0 ? t.element_bytes : strides[d - 1];
    if (sizes[d] == 0 || sizes[d] > 1ull << 32 || box[d] == 0 || box[d] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (d > 0 && (stride % 16 != 0 || stride >= 1ull << 40)) return CUDA_ERROR_INVALID_VALUE;
    if (element_strides[d] == 0 || element_strides[d] > 8) return CUDA_ERROR_INVALID_VALUE;
    if (element_strides[d] != 1) not_emulated("a tensor map with strides between elements");
    t.sizes[d] = sizes[d];
    t.strides[d] = stride;
    t.box[d] = box[d];
  }
  const uint32_t row_bytes = t.box[0] * t.element_bytes;
  if (row_bytes % 16 != 0 || (t.swizzle_bytes && row_bytes > t.swizzle_bytes)) return CUDA_ERROR_INVALID_VALUE;
  memset(map, 0, sizeof *map);
  memcpy(map, &t, sizeof t);
  return CUDA_SUCCESS;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* result) {
  if (strcmp(name, "cuTensorMapEncodeTiled") != 0) not_emulated(std::string("the driver's ") + name);
  *function = reinterpret_cast<void*>(&cuTensorMapEncodeTiled);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
}
