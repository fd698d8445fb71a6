#include "vattn/memory/mapper.hpp"

#include <pthread.h>

#include <algorithm>
#include <csignal>
#include <system_error>

#include "vattn/memory/growth.hpp"

namespace vattn {
namespace {

constexpr std::chrono::milliseconds kFirstPause{10};
constexpr std::chrono::milliseconds kLongestPause{1000};

}  // namespace

Mapper::Mapper(PagePool& pool, Holder& holder, bool zero_fill) : pool_(pool), holder_(holder), zero_fill_(zero_fill) {
  {
    const auto lock = pool_.lock();
    holder_.has_mapper = true;
    holder_.woken = true;
  }
  // The program's signals are for its own threads.
  sigset_t all;
  sigset_t before;
  ::sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    thread_ = std::thread([this] { run(); });
  } catch (const std::system_error& error) {
    ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
    const auto lock = pool_.lock();
    holder_.has_mapper = false;
    throw Error(std::string("the mapper thread could not be started (") + error.what() +
                "): allow the process another thread, or pass lookahead_tokens=0");
  }
  ::pthread_sigmask(SIG_SETMASK, &before, nullptr);
  ::pthread_setname_np(thread_.native_handle(), "vattn-mapper");
}

void Mapper::stop() noexcept {
  if (!thread_.joinable()) return;
  {
    const auto lock = pool_.lock();
    holder_.stopping = true;
    holder_.wake.notify_one();
  }
  thread_.join();
  const auto lock = pool_.lock();
  holder_.has_mapper = false;
  holder_.resting = true;
  pool_.idle_.notify_all();
}

void Mapper::settle(PagePool& pool, Holder& holder) {
  auto lock = pool.lock();
  while (holder.has_mapper && !holder.resting) pool.idle_.wait(lock);
}

void Mapper::run() noexcept {
  auto lock = pool_.lock();
  while (!holder_.stopping) {
    holder_.woken = false;
    holder_.lacks = 0;
    bool again = false;
    failed_ = false;
    try {
      again = work(lock);
    } catch (...) {
      // Undone by whoever threw; a step that cannot do without meets the same error itself.
      if (!lock.owns_lock()) lock.lock();
      failed_ = true;
    }
    if (again || holder_.stopping) {
      pause_ = std::chrono::milliseconds{0};
      continue;
    }
    if (holder_.woken && !failed_) continue;
    // Room that was kept for this holder, which turned out to lack nothing, is the next one's.
    if (!failed_ && holder_.lacks == 0) pool_.wake_lacking();
    // Who asked while the attempt that failed was under way is owed another: settle() waits for that one too.
    holder_.resting = !holder_.woken;
    pool_.idle_.notify_all();
    const auto ready = [&] { return holder_.woken || holder_.stopping; };
    if (failed_) {
      pause_ = std::clamp(2 * pause_, kFirstPause, kLongestPause);
      holder_.woken = false;  // what failed is not asked for again at once, whoever asks
      holder_.wake.wait_for(lock, pause_, [&] { return holder_.stopping.load(); });
      holder_.resting = false;
    } else {
      pause_ = std::chrono::milliseconds{0};
      holder_.wake.wait(lock, ready);
    }
  }
  holder_.resting = true;
  pool_.idle_.notify_all();
}

Mapper::Task Mapper::most_urgent() const noexcept {
  Task best;
  std::uint32_t least = UINT32_MAX;
  for (std::size_t index = 0; index < holder_.groups(); ++index) {
    const RowGroup& group = holder_.group(index);
    if (!group.active || group.busy) continue;
    for (std::size_t kind = 0; kind < group.ready.size(); ++kind) {
      if (group.ready[kind] >= group.ahead[kind]) continue;
      const std::uint32_t slack = group.ready[kind] - std::min(group.ready[kind], group.held[kind]);
      if (slack >= least) continue;
      least = slack;
      best = {true, index, group.ahead};
    }
  }
  return best;
}

Mapper::Task Mapper::next_to_warm() const noexcept {
  if (holder_.pages_in(holder_.warm_target) == 0) return {};
  Task best;
  std::uint32_t most = 0;
  for (std::size_t index = 0; index < holder_.groups(); ++index) {
    const RowGroup& group = holder_.group(index);
    if (group.active) continue;
    if (group.busy) return {};  // being warmed, or made colder: looked at again when that is over
    if (group.ready[0] >= holder_.warm_target[0] && group.ready[1] >= holder_.warm_target[1]) return {};
    if (best.any && group.ready[0] <= most) continue;
    most = group.ready[0];
    best = {true, index, holder_.warm_target};
  }
  return best;
}

bool Mapper::work(std::unique_lock<std::mutex>& lock) {
  if (shrink_to_limit(lock)) return true;
  Task task = most_urgent();
  if (!task.any) task = next_to_warm();
  if (!task.any) return false;
  if (grow(lock, task.group, task.target)) return true;
  // Not all of it: a page more in every row, if there is room for that.
  const RowGroup& group = holder_.group(task.group);
  const auto one_more = [&](std::size_t kind) { return std::min(task.target[kind], group.ready[kind] + 1); };
  const Extent less{one_more(0), one_more(1)};
  return less != task.target && grow(lock, task.group, less);
}

bool Mapper::grow(std::unique_lock<std::mutex>& lock, std::size_t group, const Extent& target) {
  Growth growth(pool_, holder_, zero_fill_);
  growth.extend(group, target);
  return growth.commit_ahead(lock) == Growth::Ahead::kDone;
}

bool Mapper::shrink_to_limit(std::unique_lock<std::mutex>& lock) {
  if (pool_.created_ <= pool_.limit_pages()) return false;
  PagePool::Losses losses;
  const bool had_pending = pool_.coldest({}, true, &holder_).holder != nullptr;
  if (pool_.settle(lock, losses)) return true;
  // Only what work may still use is left. Wait for the oldest of our own.
  const PagePool::Candidate next = pool_.coldest({}, true, &holder_);
  if (next.holder == nullptr) return had_pending;  // they passed meanwhile: look again
  const Fences fences = holder_.group(next.group).fences;
  lock.unlock();
  for (const auto& fence : fences) fence->wait();
  lock.lock();
  return true;
}

}  // namespace vattn
