// Philox for one instruction set, written as loops over lanes that the compiler turns into vectors; included by an op's
// kernels.

constexpr int kPhiloxLanes = 16;

// words [4][kPhiloxLanes]: the output for the counters (first + lane, c1, c2, c3).
BK_TARGET inline void philox(uint32_t first, uint32_t c1, uint32_t c2, uint32_t c3, uint64_t seed,
                             uint32_t (&words)[4][kPhiloxLanes]) {
  for (int l = 0; l < kPhiloxLanes; ++l) {
    words[0][l] = first + l;
    words[1][l] = c1;
    words[2][l] = c2;
    words[3][l] = c3;
  }
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round, key0 += kPhiloxWeyl0, key1 += kPhiloxWeyl1) {
    for (int l = 0; l < kPhiloxLanes; ++l) {
      const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * words[0][l];
      const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * words[2][l];
      words[0][l] = static_cast<uint32_t>(product1 >> 32) ^ words[1][l] ^ key0;
      words[1][l] = static_cast<uint32_t>(product1);
      words[2][l] = static_cast<uint32_t>(product0 >> 32) ^ words[3][l] ^ key1;
      words[3][l] = static_cast<uint32_t>(product0);
    }
  }
}
