#include "isa.h"

#include <torch/csrc/stable/library.h>

#include <cstdlib>
#include <string>

#include "../check.h"

namespace bigkern {

namespace {

constexpr Isa kAll[] = {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni, Isa::kAvx512Bf16};

Isa choose() {
  const char* forced = std::getenv("BIGKERN_CPU_ISA");
  if (!forced || !*forced) return best_isa();
  for (const Isa isa : kAll) {
    if (std::string(forced) != name(isa)) continue;
    BK_CHECK(isa <= best_isa(), "BIGKERN_CPU_ISA=", forced, " is more than this CPU has: ", name(best_isa()));
    return isa;
  }
  raise_value_error("BIGKERN_CPU_ISA must be scalar, avx2, avx512, avx512_vnni or avx512_bf16, got ", forced);
}

std::string cpu_isa() { return name(isa()); }
std::string best_cpu_isa() { return name(best_isa()); }

}  // namespace

Isa best_isa() {
#if defined(__x86_64__)
  const bool has_avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const bool has_vnni = has_avx512 && __builtin_cpu_supports("avx512vnni");
  const bool has_fast_bf16 = has_vnni && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_is("amd");
  return has_fast_bf16 ? Isa::kAvx512Bf16
         : has_vnni    ? Isa::kAvx512Vnni
         : has_avx512  ? Isa::kAvx512
         : has_avx2    ? Isa::kAvx2
                       : Isa::kScalar;
#else
  return Isa::kScalar;
#endif
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512Bf16: return "avx512_bf16";
    case Isa::kAvx512Vnni: return "avx512_vnni";
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "scalar";
  }
}

}  // namespace bigkern

STABLE_TORCH_LIBRARY_IMPL(bigkern, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&bigkern::cpu_isa));
  m.impl("best_cpu_isa", TORCH_BOX(&bigkern::best_cpu_isa));
}
