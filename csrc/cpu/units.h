// How an op's work is shared out: in units that threads take one after another.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <vector>

namespace bigkern {

// Multiplications that are worth a thread.
constexpr double kWorkPerThread = 1 << 18;

// Calls run(unit) for each unit, whichever thread is free taking the next: units differ in work.
template <class Unit, class F>
void run_units(const std::vector<Unit>& units, double work, const F& run) {
  std::atomic<size_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  const double useful_threads = std::min<double>(units.size(), 1 + std::floor(work / kWorkPerThread));
  const int64_t num_threads = std::min<double>(torch::stable::get_num_threads(), useful_threads);
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      try {
        for (size_t i = next++; i < units.size() && !failed; i = next++) run(units[i]);
      } catch (...) {  // no memory: must not leave a parallel region
        if (!failed.exchange(true)) error = std::current_exception();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

}  // namespace bigkern
