// What follows the sums of an int8 product: Y = act(sums * (row_scale x col_scale) + bias), rounded once; or the sums.
#pragma once

#include "quantize.cuh"

namespace bigkern {

// Where the sums of a product [batch, M, N] go, and what is made of them. Strides are in elements.
struct Int8Epilogue {
  void* out = nullptr;
  ScalarType dtype = ScalarType::Int;  // Int: the sums themselves, without scales, bias and activation
  // Rows come in images, of a convolution's output pixels; other products have one, of all rows.
  int64_t image_rows = 1;
  int64_t batch = 0, image = 0, row = 0, col = 1;
  const float* row_scale = nullptr;  // of each row, or of each image
  bool scale_is_of_image = false;
  const float* col_scale = nullptr;  // [batch * N], or nullptr: 1
  const void* bias = nullptr;        // [batch * N], or nullptr: 0
  ScalarType bias_dtype = ScalarType::Float;
  Activation activation = Activation::kNone;
  bool has_vectors = false;  // four columns lie together, aligned to their size
};

__host__ __device__ constexpr int64_t element_size(ScalarType dtype) {
  return dtype == ScalarType::Int || dtype == ScalarType::Float ? 4 : 2;
}

// Scalars of a run of kColumns columns, from column j of a batch's entry on.
constexpr int kColumns = 4;
struct ColumnFactors {
  float scale[kColumns], bias[kColumns];
};

__device__ inline ColumnFactors load_factors(const Int8Epilogue& p, int64_t j, int64_t columns_left) {
  ColumnFactors f;
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    const bool is_there = c < columns_left;
    f.scale[c] = is_there && p.col_scale != nullptr ? p.col_scale[j + c] : 1.0f;
    f.bias[c] = is_there && p.bias != nullptr ? load_float(p.bias, p.bias_dtype, j + c) : 0.0f;
  }
  return f;
}

// NaN stays NaN.
__device__ inline float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    case Activation::kGelu: return x * fmaf(0.5f, erff(x * 0.70710678f), 0.5f);
    case Activation::kGeluTanh: {
      const float inner = x * fmaf(x * x, 0.044715f * 0.79788456f, 0.79788456f);
      return x * fmaf(0.5f, tanhf(inner), 0.5f);
    }
    case Activation::kSilu: return x / (1.0f + exp2_approx(x * -1.44269504f));
    default: return x;
  }
}

// Where a row begins, and its scale.
struct OutputRow {
  int64_t offset;
  float scale;
};

// Rows from `first` on, which costs a division once; a run of rows meets few images.
class OutputRows {
 public:
  __device__ OutputRows(const Int8Epilogue& p, int64_t first)
      : first_image_(first / p.image_rows), first_in_image_(first % p.image_rows) {}

  __device__ OutputRow operator()(const Int8Epilogue& p, int i) const {
    int64_t image = first_image_, in_image = first_in_image_ + i;
    for (; in_image >= p.image_rows; in_image -= p.image_rows) ++image;
    OutputRow row{image * p.image + in_image * p.row, 1.0f};
    if (p.row_scale != nullptr) {
      row.scale = p.row_scale[p.scale_is_of_image ? image : image * p.image_rows + in_image];
    }
    return row;
  }

 private:
  int64_t first_image_, first_in_image_;
};

template <class T>
struct alignas(kColumns * sizeof(T)) ColumnVector {
  T at[kColumns];
};

template <class T, class V>
__device__ void store_columns(const Int8Epilogue& p, int64_t offset, int64_t columns_left,
                              const V (&values)[kColumns]) {
  T* const out = static_cast<T*>(p.out) + offset;
  if (p.has_vectors && columns_left >= kColumns) {
    ColumnVector<T> vector;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) vector.at[c] = static_cast<T>(values[c]);
    *reinterpret_cast<ColumnVector<T>*>(out) = vector;
    return;
  }
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    if (c < columns_left) out[c * p.col] = static_cast<T>(values[c]);
  }
}

// A row's run of columns, which begins at `offset` and of which `columns_left` exist.
__device__ inline void finish(const Int8Epilogue& p, int64_t offset, int64_t columns_left, float row_scale,
                              const ColumnFactors& f, const int32_t (&sums)[kColumns]) {
  if (p.dtype == ScalarType::Int) return store_columns<int32_t>(p, offset, columns_left, sums);
  float y[kColumns];
#pragma unroll
  for (int c = 0; c < kColumns; ++c) {
    y[c] = fmaf(__int2float_rn(sums[c]), row_scale * f.scale[c], f.bias[c]);
  }
  if (p.activation != Activation::kNone) {  // one branch where there is none, instead of several a column
#pragma unroll
    for (int c = 0; c < kColumns; ++c) y[c] = activate(y[c], p.activation);
  }
  switch (p.dtype) {
    case ScalarType::Half: return store_columns<Half>(p, offset, columns_left, y);
    case ScalarType::BFloat16: return store_columns<BFloat16>(p, offset, columns_left, y);
    default: return store_columns<float>(p, offset, columns_left, y);
  }
}

}  // namespace bigkern
