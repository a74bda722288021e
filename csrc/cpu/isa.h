// Instruction sets. Everything is compiled for baseline x86-64; micro-kernels carry a target attribute and are chosen
// once per process. A function with such an attribute must not contain a lambda: GCC would compile that for the
// baseline.
#pragma once

#define BK_TARGET_SCALAR
#define BK_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define BK_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,f16c")))
#define BK_TARGET_AVX512_VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")))

namespace bigkern {

// kAvx512Vnni is AVX-512 with vpdpbusd, which adds up products of four pairs of 8 bits in int32. kAvx512Bf16 has that
// and vdpbf16ps, which adds up products of pairs of bfloat16 in float32, twice as fast as the float32 FMA: AMD's Zen 4
// and later. (Intel's cores run it at half the speed of the FMA.)
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Vnni, kAvx512Bf16 };

// The best set of this CPU.
Isa best_isa();

// The set in use: BIGKERN_CPU_ISA, by the names of name(), if set, else the best. Raises ValueError for an unknown name
// or a set that this CPU lacks.
Isa isa();

const char* name(Isa isa);

// Picks one of the three variants of a kernel.
template <class Kernel>
Kernel select(Kernel scalar, Kernel avx2, Kernel avx512) {
  const Isa in_use = isa();
  return in_use >= Isa::kAvx512 ? avx512 : in_use == Isa::kAvx2 ? avx2 : scalar;
}

}  // namespace bigkern
