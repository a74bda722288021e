// Bank conflicts. Lanes run one after another, so an access of the warp is put together from each lane's n-th visit of
// the same place.
#include <algorithm>
#include <unordered_map>

#include "scheduler.h"

namespace emulator {

namespace {

constexpr int kBanks = 32, kBankBytes = 4;

struct Access {
  uint32_t lanes = 0, bytes = 0;
  uint32_t offsets[kWarp];
};

int num_sites = 0;
std::unordered_map<uint64_t, Access> accesses;  // by warp, place and visit

// Extra cycles of 8, 4 or 2 lanes' 16, 8 or 4 bytes each: a cycle serves a warp's 128 bytes, one word of each bank.
void count(const Access& access) {
  ++statistics.shared_accesses;
  const int lanes_at_once = std::min<int>(kWarp, kBanks * kBankBytes / access.bytes);
  for (int first = 0; first < kWarp; first += lanes_at_once) {
    std::vector<uint32_t> words[kBanks];
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(access.lanes >> lane & 1)) continue;
      for (uint32_t byte = 0; byte < access.bytes; byte += kBankBytes) {
        const uint32_t word = (access.offsets[lane] + byte) / kBankBytes;
        auto& bank = words[word % kBanks];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    }
    size_t cycles = 1;
    for (const auto& bank : words) cycles = std::max(cycles, bank.size());
    statistics.bank_conflicts += cycles - 1;
  }
}

}  // namespace

void record_shared_access(Site& site, uint32_t offset, uint32_t bytes) {
  if (site.number == 0) site.number = ++num_sites;
  auto& visits = self().visits;
  if (visits.size() <= static_cast<size_t>(site.number)) visits.resize(site.number + 1);
  const uint64_t visit = visits[site.number]++;
  Access& access = accesses[static_cast<uint64_t>(current->warp) << 56 | visit << 20 | site.number];
  access.lanes |= 1u << current->lane;
  access.bytes = bytes;
  access.offsets[current->lane] = offset;
}

void finish_profile() {
  for (const auto& [key, access] : accesses) count(access);
  accesses.clear();
}

}  // namespace emulator
