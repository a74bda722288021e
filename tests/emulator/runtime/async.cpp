#include "async.h"

#include <algorithm>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

#include "scheduler.h"

namespace emulator {

namespace {

struct Work {
  const Site* site;
  std::function<void()> run, end;
  bool is_done = false;
};
std::deque<std::shared_ptr<Work>> waiting;

struct Groups {
  std::vector<std::shared_ptr<Work>> open;
  std::deque<std::vector<std::shared_ptr<Work>>> committed;
};
std::vector<Groups> groups;  // of each thread

void run(Work& work) {
  if (std::exchange(work.is_done, true)) return;
  work.run();
}

void start(const std::shared_ptr<Work>& work) {
  const bool is_early = settings.order == Order::descending || (settings.order == Order::random && draw() % 4 == 0);
  if (is_early) {
    run(*work);
  } else {
    waiting.push_back(work);
  }
}

}  // namespace

void start_async(const Site& site, std::function<void()> work) {
  start(std::make_shared<Work>(Work{&site, std::move(work), {}}));
}

bool run_async() {
  while (!waiting.empty()) {
    if (settings.order == Order::random) std::swap(waiting.front(), waiting[draw() % waiting.size()]);
    const auto work = waiting.front();
    waiting.pop_front();
    if (work->is_done) continue;
    run(*work);
    return true;
  }
  return false;
}

void stir_async() {
  if (!waiting.empty() && settings.order == Order::random && draw() % 8 == 0) run_async();
}

void reset_async() {
  waiting.clear();
  groups.assign(num_numbers(), {});
}

void finish_async() {
  for (const auto& work : waiting) {
    if (!work->is_done) fail("%s at %s: the block has exited before it is done", work->site->what, work->site->source);
  }
}

void start_in_group(const Site& site, std::function<void()> work, std::function<void()> end) {
  const auto shared = std::make_shared<Work>(Work{&site, std::move(work), std::move(end)});
  groups[current->number].open.push_back(shared);
  start(shared);
}

void commit_bulk_group() {
  Groups& mine = groups[current->number];
  mine.committed.push_back(std::exchange(mine.open, {}));
}

void wait_for_bulk_groups(uint32_t pending) {
  Groups& mine = groups[current->number];
  while (mine.committed.size() > pending) {
    for (const auto& work : mine.committed.front()) {
      run(*work);
      work->end();
    }
    mine.committed.pop_front();
  }
}

}  // namespace emulator
