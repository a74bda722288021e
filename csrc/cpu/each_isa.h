// Compiles the file BK_KERNELS once per instruction set, into namespaces of bigkern: scalar, avx2 and avx512. There,
// BK_TARGET marks a function and Float and Double are the vector registers.
#include "vec.h"

namespace bigkern {

namespace scalar {
#define BK_TARGET BK_TARGET_SCALAR
#include BK_KERNELS
#undef BK_TARGET
}  // namespace scalar

#if defined(__x86_64__)
namespace avx2 {
#define BK_TARGET BK_TARGET_AVX2
#include BK_KERNELS
#undef BK_TARGET
}  // namespace avx2

namespace avx512 {
#define BK_TARGET BK_TARGET_AVX512
#include BK_KERNELS
#undef BK_TARGET
}  // namespace avx512
#else
namespace avx2 = scalar;
namespace avx512 = scalar;
#endif

}  // namespace bigkern
