// Loops run on the threads of torch's OpenMP runtime where there is one. Elsewhere they run on a small pool of this
// module. Forked children use the pool too: an OpenMP runtime that was used before the fork hangs in them. The module
// does not link OpenMP, which would load a second runtime into the process.
#include "parallel.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace rewardops::cpu {
namespace {

struct Job {
  const std::function<void(int64_t, int64_t)>* body;
  int64_t items, chunk;
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_lock;

  void run() {
    for (;;) {
      const int64_t begin = next.fetch_add(chunk);
      if (begin >= items) return;
      try {
        (*body)(begin, begin + chunk < items ? begin + chunk : items);
      } catch (...) {
        const std::lock_guard<std::mutex> hold(error_lock);
        if (!error) error = std::current_exception();
        next = items;
      }
    }
  }
};

class Pool {
 public:
  // Runs one job at a time; returns false, without running it, if the pool is busy.
  bool run(Job& job, int helpers) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> hold(lock_);
      while (static_cast<int>(workers_.size()) < helpers) {
        const int index = static_cast<int>(workers_.size());
        workers_.emplace_back([this, index, seen = round_] { work(index, seen); });
      }
      job_ = &job;
      wanted_ = running_ = helpers;
      ++round_;
    }
    wake_.notify_all();
    job.run();
    std::unique_lock<std::mutex> hold(lock_);
    done_.wait(hold, [this] { return running_ == 0; });
    job_ = nullptr;
    return true;
  }

 private:
  void work(int index, uint64_t seen) {
    std::unique_lock<std::mutex> hold(lock_);
    for (;;) {
      wake_.wait(hold, [&] { return round_ != seen; });
      seen = round_;
      if (index >= wanted_) continue;
      Job* job = job_;
      hold.unlock();
      job->run();
      hold.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_, lock_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  Job* job_ = nullptr;
  int wanted_ = 0, running_ = 0;
  uint64_t round_ = 0;
};

std::atomic<Team> openmp{nullptr};

// Never destroyed: its threads sleep until the process ends. A forked child has none of the threads and gets a new
// pool. The handler is registered when the module is loaded, as torch may use its runtime before this module does.
std::atomic<Pool*> pool{new Pool};

[[maybe_unused]] const int at_fork = pthread_atfork(nullptr, nullptr, [] {
  pool = new Pool;
  openmp = nullptr;
});

}  // namespace

void use_team(Team team) { openmp = team; }

void parallel_for(int64_t items, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body) {
  if (items <= 0) return;
  const int64_t most = (items + grain - 1) / grain;
  const int64_t used = most < threads ? most : threads;
  if (used <= 1) return body(0, items);
  Job job;
  job.body = &body;
  job.items = items;
  // A few ranges per thread even out rows of different length.
  const int64_t even = items / (used * 4);
  job.chunk = even > grain ? even : grain;
  if (const Team team = openmp) {
    team([](void* data) { static_cast<Job*>(data)->run(); }, &job, static_cast<unsigned>(used), 0);
  } else if (!pool.load()->run(job, static_cast<int>(used) - 1)) {
    return body(0, items);
  }
  if (job.error) std::rethrow_exception(job.error);
}

}  // namespace rewardops::cpu
