// The only check macro: an argument that doesn't hold raises ValueError in Python, naming what was wanted and what
// came.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <string>

namespace bigkern {

template <class... Args>
[[noreturn]] void raise_value_error(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::invalid_argument(message.str());
}

#define BK_CHECK(condition, ...)                 \
  do {                                           \
    if (__builtin_expect(!(condition), 0)) {     \
      ::bigkern::raise_value_error(__VA_ARGS__); \
    }                                            \
  } while (false)

inline const char* name(torch::headeronly::ScalarType dtype) {
  using torch::headeronly::ScalarType;
  switch (dtype) {
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    default: return torch::headeronly::toString(dtype);
  }
}

inline std::string shape(const torch::stable::Tensor& t) {
  std::ostringstream text;
  text << "[";
  for (int64_t d = 0; d < t.dim(); ++d) text << (d ? ", " : "") << t.size(d);
  text << "]";
  return text.str();
}

}  // namespace bigkern
