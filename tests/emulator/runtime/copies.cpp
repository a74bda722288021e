// cp.async: bytes that arrive in shared memory when their thread waits for them.
#include <cstring>

#include "races.h"
#include "scheduler.h"

namespace emulator {

void copy_async(const Site& site, unsigned char* to, const unsigned char* from, uint32_t bytes, uint32_t bytes_from) {
  memset(to, 0xff, bytes);
  if (settings.watches & kRaces) begin_transfer(site, By::thread, to - cluster.smem, bytes, true);
  self().copies.push_back({to, from, bytes, bytes_from, self().num_groups});
}

void commit_copies() { ++self().num_groups; }

void wait_for_copies(uint32_t pending_groups) {
  Fiber& me = self();
  auto kept = me.copies.begin();
  for (const Copy& copy : me.copies) {
    if (copy.group + pending_groups >= me.num_groups) {
      *kept++ = copy;
      continue;
    }
    memcpy(copy.to, copy.from, copy.bytes_from);
    memset(copy.to + copy.bytes_from, 0, copy.bytes - copy.bytes_from);
    if (settings.watches & kRaces) end_transfer(By::thread, copy.to - cluster.smem, copy.bytes);
  }
  me.copies.erase(kept, me.copies.end());
}

}  // namespace emulator
