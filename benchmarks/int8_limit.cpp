// GOP/s (two for each product and addition) of int8 products in registers: a bare loop of the fastest instructions that
// this CPU has for them. Without VNNI it is the faster of two sequences: one saturates, the other is exact.
//
// c++ -O2 -pthread int8_limit.cpp -o int8_limit && ./int8_limit THREADS
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#define TWELVE(STEP) STEP(0) STEP(1) STEP(2) STEP(3) STEP(4) STEP(5) STEP(6) STEP(7) STEP(8) STEP(9) STEP(10) STEP(11)
#define CLOBBERS                                                                                                      \
  "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12", "xmm13", \
      "xmm14", "xmm15"
#define LOOP(STEP) asm volatile("1:\n\t" TWELVE(STEP) "sub $1, %0\n\tjnz 1b\n\t" : "+r"(n)::CLOBBERS)

#define VNNI(i) "vpdpbusd %%zmm12, %%zmm13, %%zmm" #i "\n\t"
#define SATURATING(i)                        \
  "vpmaddubsw %%ymm12, %%ymm13, %%ymm14\n\t" \
  "vpmaddwd %%ymm12, %%ymm14, %%ymm14\n\t"   \
  "vpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"
#define EXACT(i)                           \
  "vpaddw %%ymm12, %%ymm13, %%ymm14\n\t"   \
  "vpaddw %%ymm12, %%ymm13, %%ymm15\n\t"   \
  "vpmaddwd %%ymm15, %%ymm14, %%ymm14\n\t" \
  "vpaddd %%ymm14, %%ymm" #i ", %%ymm" #i "\n\t"

__attribute__((target("avx512f"))) void vnni(long n) { LOOP(VNNI); }
__attribute__((target("avx2"))) void saturating(long n) { LOOP(SATURATING); }
__attribute__((target("avx2"))) void exact(long n) { LOOP(EXACT); }

double gops(void (*loop)(long), int products, int threads) {
  constexpr long kSteps = 4'000'000;
  double best = 0;
  for (int round = 0; round < 9; ++round) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    for (int t = 0; t < threads; ++t) others.emplace_back(loop, kSteps);
    for (std::thread& other : others) other.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, 2e-9 * products * 12 * kSteps * threads / seconds.count());
  }
  return best;
}

int main(int, char** argv) {
  const int threads = std::atoi(argv[1]);
  const bool has_vnni = __builtin_cpu_supports("avx512vnni");
  std::printf("%.0f\n",
              has_vnni ? gops(vnni, 64, threads) : std::max(gops(saturating, 32, threads), gops(exact, 32, threads)));
}
