// Included before each source of the op library: its ops are bigkern_emulated's, and its CUDA kernels take CPU tensors.
#include <torch/csrc/stable/library.h>

#undef STABLE_TORCH_LIBRARY
#define STABLE_TORCH_LIBRARY(ns, m)                                                                                \
  static void define_ops(torch::stable::detail::StableLibrary&);                                                   \
  static const torch::stable::detail::StableTorchLibraryInit define_ops_init(                                      \
      torch::stable::detail::StableLibrary::Kind::DEF, &define_ops, #ns "_emulated", nullptr, __FILE__, __LINE__); \
  void define_ops(torch::stable::detail::StableLibrary& m)

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(ns, key, m)                                                                        \
  static void implement_ops(torch::stable::detail::StableLibrary&);                                                  \
  static const torch::stable::detail::StableTorchLibraryInit implement_ops_init(                                     \
      torch::stable::detail::StableLibrary::Kind::IMPL, &implement_ops, #ns "_emulated", "CPU", __FILE__, __LINE__); \
  void implement_ops(torch::stable::detail::StableLibrary& m)
