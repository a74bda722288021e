// Bank conflicts of shared memory, sectors of global memory. Lanes run one after another, so an access of the warp is
// put together from each lane's n-th visit of the same place.
#include <algorithm>
#include <unordered_map>

#include "scheduler.h"

namespace emulator {

namespace {

enum class Space { shared, global_read, global_written };

constexpr int kBanks = 32, kBankBytes = 4, kSectorBytes = 32;

struct Access {
  Space space;
  uint32_t lanes = 0, bytes = 0;
  uint64_t addresses[kWarp];
};

int num_sites = 0;
std::unordered_map<uint64_t, Access> accesses;  // by warp, place and visit

// Extra cycles of 8, 4 or 2 lanes' 16, 8 or 4 bytes each: a cycle serves a warp's 128 bytes, one word of each bank.
void count_conflicts(const Access& access) {
  ++statistics.shared_accesses;
  const int lanes_at_once = std::min<int>(kWarp, kBanks * kBankBytes / access.bytes);
  for (int first = 0; first < kWarp; first += lanes_at_once) {
    std::vector<uint64_t> words[kBanks];
    for (int lane = first; lane < first + lanes_at_once; ++lane) {
      if (!(access.lanes >> lane & 1)) continue;
      for (uint32_t byte = 0; byte < access.bytes; byte += kBankBytes) {
        const uint64_t word = (access.addresses[lane] + byte) / kBankBytes;
        auto& bank = words[word % kBanks];
        if (std::find(bank.begin(), bank.end(), word) == bank.end()) bank.push_back(word);
      }
    }
    size_t cycles = 1;
    for (const auto& bank : words) cycles = std::max(cycles, bank.size());
    statistics.bank_conflicts += cycles - 1;
  }
}

// What a warp asks for at once is moved in sectors, each once.
void count_sectors(const Access& access) {
  std::vector<uint64_t> sectors;
  for (uint32_t rest = access.lanes; rest; rest &= rest - 1) {
    const uint64_t begin = access.addresses[__builtin_ctz(rest)];  // it is aligned to its bytes, at most a sector
    sectors.push_back(begin / kSectorBytes);
  }
  std::sort(sectors.begin(), sectors.end());
  const auto count = std::unique(sectors.begin(), sectors.end()) - sectors.begin();
  (access.space == Space::global_read ? statistics.sectors_read : statistics.sectors_written) += count;
}

void count(const Access& access) {
  if (access.space == Space::shared) {
    count_conflicts(access);
  } else {
    count_sectors(access);
  }
}

void record(Site& site, Space space, uint64_t address, uint32_t bytes) {
  if (site.number == 0) site.number = ++num_sites;
  // An atomic operation is two accesses at one place.
  const size_t place = site.number * 2 + (space == Space::global_written);
  auto& visits = self().visits;
  if (visits.size() <= place) visits.resize(place + 1);
  const uint64_t visit = visits[place]++, key = static_cast<uint64_t>(current->warp) << 54 | visit << 20 | place;
  Access& access = accesses[key];
  access.space = space;
  access.lanes |= 1u << current->lane;
  access.bytes = bytes;
  access.addresses[current->lane] = address;
  if (access.lanes != ~0u) return;
  count(access);
  accesses.erase(key);
}

}  // namespace

void record_access(Site& site, bool is_shared, uint64_t address, uint32_t bytes, bool reads, bool writes) {
  if (is_shared) {
    if (settings.watches & kConflicts) record(site, Space::shared, address, bytes);
  } else if (settings.watches & kSectors) {
    if (reads) record(site, Space::global_read, address, bytes);
    if (writes) record(site, Space::global_written, address, bytes);
  }
}

void finish_profile() {
  for (const auto& [key, access] : accesses) count(access);
  accesses.clear();
}

}  // namespace emulator
