// What a CUDA thread is on the host. There are two engines behind the same names:
//
//   run(count, body)      calls body(0 .. count - 1), each as a CUDA thread, and returns when all have
//   Mutex, Waiters        how threads of one run wait for one another
//   give_way(), moved()   what a thread does that may be polling memory, and one that has written some
//
// Fibers, the default: all threads are on the thread of the system that calls run(), which goes from one to the next
// where they wait. A switch takes some ten nanoseconds, and every run goes the same way. Threads of the system, under
// a sanitizer or with -DCUDA_ON_HOST_THREADS: the order is what the system makes it, and the sanitizer sees it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <tuple>
#include <vector>

#include "include/vector_types.h"

#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
#define CUDA_ON_HOST_THREADS 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer) || __has_feature(address_sanitizer)
#define CUDA_ON_HOST_THREADS 1
#endif
#endif

// State of the harness. It is hidden, so that shared objects made with different engines live in one process.
#define CUDA_ON_HOST_STATE [[gnu::visibility("hidden")]] inline

#ifdef CUDA_ON_HOST_THREADS
#include <atomic>
#include <condition_variable>
#include <thread>
#define CUDA_ON_HOST_OWN CUDA_ON_HOST_STATE thread_local  // what each CUDA thread has of its own
#else
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>
#define CUDA_ON_HOST_OWN CUDA_ON_HOST_STATE
#endif

CUDA_ON_HOST_OWN uint3 threadIdx, blockIdx;
CUDA_ON_HOST_OWN dim3 blockDim, gridDim;

namespace cuda_on_host {

struct Block;
CUDA_ON_HOST_OWN Block* block = nullptr;
CUDA_ON_HOST_OWN unsigned thread = 0;  // of the block, linear

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "cuda_on_host: %s (block %u, thread %u)\n", what, blockIdx.x, threadIdx.x);
  std::abort();
}

[[noreturn]] inline void fail_deadlock() {
  fail("a deadlock: all threads that are left wait, at barriers, shuffles or votes that others of them do not reach");
}

#ifdef CUDA_ON_HOST_THREADS

using Mutex = std::mutex;

// Threads that have not left, in the upper half, and those of them that do not wait, in the lower. Relaxed accesses:
// the thread sanitizer must not take the count for an order between threads.
CUDA_ON_HOST_STATE std::atomic<uint64_t> at_work{0};
constexpr uint64_t kLeft = uint64_t{1} << 32;

inline void stop_working(uint64_t what) {
  const uint64_t now = at_work.fetch_sub(what, std::memory_order_relaxed) - what;
  if (now >= kLeft && now % kLeft == 0) fail_deadlock();
}

class Waiters {
 public:
  // Waits, under the lock, until wake() is called, which makes `done` true.
  template <typename Done>
  void wait(std::unique_lock<Mutex>& lock, Done done) {
    ++count_;
    stop_working(1);
    changed_.wait(lock, done);
  }
  void wake() {
    at_work.fetch_add(count_, std::memory_order_relaxed);
    count_ = 0;
    changed_.notify_all();
  }

 private:
  std::condition_variable changed_;
  unsigned count_ = 0;
};

inline void give_way() { std::this_thread::yield(); }
inline void moved() {}

// A thread of the system that takes part in one run after another: to make one takes longer than most kernels do, above
// all under a sanitizer.
struct Member {
  std::mutex mutex;
  std::condition_variable called;
  bool go = false;
};

struct Team {
  std::vector<Member*> pool;  // made once, and used by all runs
  std::mutex mutex;
  std::condition_variable returned;
  unsigned left = 0;  // members of this run that have not returned
  void (*call)(const void* body, unsigned index) = nullptr;
  const void* body = nullptr;
};
// It lives as long as its threads, which are never joined.
CUDA_ON_HOST_STATE Team& team = *new Team;

// An exception that leaves a kernel ends the process.
inline void life_of_a_member(Member& self, unsigned index) noexcept {
  for (;;) {
    {
      std::unique_lock<std::mutex> lock(self.mutex);
      self.called.wait(lock, [&] { return self.go; });
      self.go = false;
    }
    team.call(team.body, index);
    stop_working(kLeft + 1);
    const std::lock_guard<std::mutex> lock(team.mutex);
    if (--team.left == 0) team.returned.notify_one();
  }
}

template <typename Body>
void run(unsigned count, const Body& body) {
  while (team.pool.size() < count) {
    auto* member = new Member;
    const auto index = static_cast<unsigned>(team.pool.size());
    std::thread([member, index] { life_of_a_member(*member, index); }).detach();
    team.pool.push_back(member);
  }
  at_work = count * (kLeft + 1);
  team.call = [](const void* what, unsigned index) { (*static_cast<const Body*>(what))(index); };
  team.body = &body;
  team.left = count;
  for (unsigned t = 0; t < count; ++t) {
    const std::lock_guard<std::mutex> lock(team.pool[t]->mutex);
    team.pool[t]->go = true;
    team.pool[t]->called.notify_one();
  }
  std::unique_lock<std::mutex> lock(team.mutex);
  team.returned.wait(lock, [] { return team.left == 0; });
}

#else

// One fiber runs at a time, and waits by itself.
struct Mutex {
  void lock() {}
  void unlock() {}
};

struct Fiber {
  jmp_buf at;  // where it goes on
  unsigned index = 0;
  Fiber* next = nullptr;  // in the queue that it is in
};

struct Queue {
  Fiber *first = nullptr, *last = nullptr;
  void push(Fiber* fiber) { append({fiber, fiber}); }
  void append(Queue more) {
    if (!more.first) return;
    (first ? last->next : first) = more.first;
    last = more.last;
    last->next = nullptr;
  }
  Fiber* pop() {
    Fiber* fiber = first;
    first = fiber->next;
    return fiber;
  }
};

struct Fibers {
  std::vector<Fiber*> pool;  // made once, and used by all runs
  Queue ready;               // those that can go on, but for the running one
  Fiber outside;             // who called run()
  Fiber* running = &outside;
  unsigned left = 0;     // fibers of this run that have not returned
  uint64_t polling = 0;  // how often one gave way since the last that moved
  void (*call)(const void* body, unsigned index) = nullptr;
  const void* body = nullptr;
};
CUDA_ON_HOST_STATE Fibers fibers;

constexpr size_t kStack = size_t{64} << 10, kGuard = size_t{64} << 10;
constexpr uint64_t kPatience = uint64_t{1} << 27;  // some seconds

// longjmp by a name of our own: with _FORTIFY_SOURCE, the C library's header has it refuse another stack.
extern "C" [[noreturn]] void cuda_on_host_longjmp(jmp_buf, int) __asm__("_longjmp");

[[gnu::noinline]] inline void hop(Fiber& from, Fiber& to) {
  if (_setjmp(from.at) == 0) cuda_on_host_longjmp(to.at, 1);
}

// Goes on elsewhere; comes back once this fiber has been made ready and its turn has come.
inline void pass() {
  Fibers& f = fibers;
  if (!f.ready.first && f.left) fail_deadlock();
  Fiber *const from = f.running, *const to = f.left ? f.ready.pop() : &f.outside;
  f.running = to;
  if (to == from) return;
  const auto own = std::tuple(threadIdx, blockIdx, block, thread);
  hop(*from, *to);
  std::tie(threadIdx, blockIdx, block, thread) = own;
}

// Something has happened that another thread may be polling for.
inline void moved() { fibers.polling = 0; }

inline void give_way() {
  if (fibers.running == &fibers.outside) return;  // an atomic of the host
  if (++fibers.polling > kPatience) fail("threads poll for what nobody writes");
  fibers.ready.push(fibers.running);
  pass();
}

class Waiters {
 public:
  template <typename Done>
  void wait(std::unique_lock<Mutex>&, Done) {
    moved();
    waiting_.push(fibers.running);
    pass();
  }
  void wake() {
    fibers.ready.append(waiting_);
    waiting_ = {};
  }

 private:
  Queue waiting_;
};

// An exception that leaves a kernel ends the process, as it does on a thread.
inline void life_of_a_fiber() noexcept {
  Fiber& self = *fibers.running;
  hop(self, fibers.outside);
  for (;;) {
    fibers.call(fibers.body, self.index);
    --fibers.left;
    moved();
    pass();
  }
}

// Starts the fiber up to the hop above; from there it is only hopped to.
[[gnu::noinline]] inline void start(Fiber& fiber, ucontext_t& at) {
  fibers.running = &fiber;
  if (_setjmp(fibers.outside.at) == 0) setcontext(&at);
  fibers.running = &fibers.outside;
}

inline void add_fiber() {
  auto* fiber = new Fiber;
  fiber->index = static_cast<unsigned>(fibers.pool.size());
  constexpr int kKind = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, kKind, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE)) fail("no memory for the stack of a thread");
  ucontext_t at;
  if (getcontext(&at)) fail("getcontext");
  at.uc_stack.ss_sp = static_cast<char*>(memory) + kGuard;
  // Stacks that began at the same place of a page would share a few sets of the cache.
  at.uc_stack.ss_size = kStack - fiber->index * 7 % 64 * 64;
  at.uc_link = nullptr;
  makecontext(&at, life_of_a_fiber, 0);
  start(*fiber, at);
  fibers.pool.push_back(fiber);
}

template <typename Body>
void run(unsigned count, const Body& body) {
  Fibers& f = fibers;
  while (f.pool.size() < count) add_fiber();
  f.call = [](const void* what, unsigned index) { (*static_cast<const Body*>(what))(index); };
  f.body = &body;
  f.left = count;
  for (unsigned t = 0; t < count; ++t) f.ready.push(f.pool[t]);
  moved();
  pass();
}

#endif

}  // namespace cuda_on_host
