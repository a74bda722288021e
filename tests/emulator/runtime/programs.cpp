// What a warp does at one meeting, and shuffles.
#include <cstring>

#include "emulator.h"

namespace emulator {

namespace {

struct Lane {
  const Program* program;
  uint32_t* slots;
};

bool are_equal(const Program& a, const Program& b) {
  if (&a == &b) return true;
  const auto is_same = [](const Operation& x, const Operation& y) {
    return x.work == y.work && x.output == y.output && memcmp(x.inputs, y.inputs, sizeof x.inputs) == 0;
  };
  return a.size == 1 && b.size == 1 && is_same(*a.operations, *b.operations);
}

void run_lanes(const Site&, void** arguments, uint32_t lanes) {
  uint32_t* slots[kWarp] = {};
  const Program& program = *static_cast<Lane*>(arguments[__builtin_ctz(lanes)])->program;
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    const int i = __builtin_ctz(rest);
    const Lane& lane = *static_cast<Lane*>(arguments[i]);
    slots[i] = lane.slots;
    if (!are_equal(program, *lane.program)) {
      const Site &one = *program.operations->site, &other = *lane.program->operations->site;
      fail("divergent warp: lane %d is at %s at %s, others are at %s at %s", i, other.what, other.source, one.what,
           one.source);
    }
  }
  for (int i = 0; i < program.size; ++i) program.operations[i].work(program.operations[i], slots, lanes);
  statistics.warp_operations += program.size - 1;  // one has been counted
}

}  // namespace

void run_together(const Program& program, uint32_t mask, uint32_t* slots) {
  Lane mine{&program, slots};
  meet(*program.operations->site, mask, &mine, run_lanes);
}

// Inputs: the value, a lane, and the segment's mask with its last lane; results: the value read, and whether it is from
// the segment.
template <Shuffle mode>
void shuffle(const Operation& o, uint32_t* const* slots, uint32_t lanes) {
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    // The definition in the PTX ISA.
    const int me = __builtin_ctz(rest);
    uint32_t* mine = slots[me];
    const int b = mine[o.inputs[1]] & 31, clamp = mine[o.inputs[2]], segment = clamp >> 8 & 31, last = clamp & 31;
    const int max_lane = (me & segment) | (last & ~segment), min_lane = me & segment;
    int source = 0;
    bool is_in_range = false;
    switch (mode) {
      case Shuffle::up: source = me - b, is_in_range = source >= max_lane; break;
      case Shuffle::down: source = me + b, is_in_range = source <= max_lane; break;
      case Shuffle::bfly: source = me ^ b, is_in_range = source <= max_lane; break;
      case Shuffle::idx: source = min_lane | (b & ~segment), is_in_range = source <= max_lane; break;
    }
    if (!is_in_range) source = me;
    if (!(lanes >> source & 1)) {
      fail("%s at %s: lane %d reads lane %d, which isn't there (%08x are)", o.site->what, o.site->source, me, source,
           lanes);
    }
    mine[o.output] = slots[source][o.inputs[0]];
    mine[o.output + 1] = is_in_range;
  }
}

template void shuffle<Shuffle::up>(const Operation&, uint32_t* const*, uint32_t);
template void shuffle<Shuffle::down>(const Operation&, uint32_t* const*, uint32_t);
template void shuffle<Shuffle::bfly>(const Operation&, uint32_t* const*, uint32_t);
template void shuffle<Shuffle::idx>(const Operation&, uint32_t* const*, uint32_t);

void elect(const Operation& o, uint32_t* const* slots, uint32_t lanes) {
  const uint32_t leader = __builtin_ctz(lanes);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) {
    uint32_t* mine = slots[__builtin_ctz(rest)];
    mine[o.output] = leader;
    mine[o.output + 1] = static_cast<uint32_t>(__builtin_ctz(rest)) == leader;
  }
}

}  // namespace emulator
