// Threads that share the work of a kernel. Compiled first, in the same translation unit.
//
// On a free machine they are OpenMP's, which PyTorch's own loops use, too. OpenMP waits for every thread at the end of each
// loop. Where another program uses a processor, one of them is not running, and a loop of 50 microseconds waits for its next
// turn, which is milliseconds away. Within a crowded step (`dq_begin_step`) kernels use a pool instead. Its caller works
// itself and waits only for pieces that another thread has begun: a thread that gets no processor takes no pieces. PyTorch's
// loops have one thread meanwhile, because OpenMP's threads wait in a busy loop and would keep the processors from the pool's.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <omp.h>
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using i64 = int64_t;

inline void pause_() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Waits until `value` is not `old`: turns around for some tens of microseconds, in which the next loop mostly comes, then sleeps.
template <class T>
void wait_while(std::atomic<T>& value, T old) {
  constexpr int TURNS = 3000;
  for (int i = 0; i < TURNS; ++i) {
    if (value.load() != old) return;
    pause_();
  }
  value.wait(old);
}

thread_local int in_step = 0;  // threads for the crowded step that this thread computes; 0 outside of one
std::atomic<int> crowded_steps{0};

class Pool {
 public:
  // Calls work(context, from, to) for pieces of 0 .. count - 1 on the caller and up to `threads - 1` others. Returns false, with
  // nothing done, where another thread's loop uses them.
  bool run(void (*work)(void*, i64, i64), void* context, i64 count, i64 piece, int threads) {
    std::unique_lock<std::mutex> lock(owner_, std::try_to_lock);
    if (!lock.owns_lock()) return false;
    while (started_ < threads - 1 && start_one()) ++started_;
    work_ = work, context_ = context, count_ = count, piece_ = piece, helpers_ = threads - 1;
    next_ = 0;
    joined_ = 0;
    open_ = true;
    ++announced_;
    for (int i = 0; i < helpers_; ++i) announced_.notify_one();
    take_pieces();
    open_ = false;
    for (int inside = inside_; inside; inside = inside_) wait_while(inside_, inside);
    return true;
  }

 private:
  bool start_one() {
    try {
      std::thread([this] { help(); }).detach();
      return true;
    } catch (const std::system_error&) {  // the system allows no more threads: the caller does what they would
      return false;
    }
  }

  void help() {
    use_all_processors();
    for (uint32_t seen = 0;;) {
      wait_while(announced_, seen);
      seen = announced_;
      // The caller closes the loop before it reads `inside_`, so that it either sees this thread or keeps it out.
      ++inside_;
      if (open_ && joined_++ < helpers_) take_pieces();
      if (--inside_ == 0) inside_.notify_all();
    }
  }

  void take_pieces() {
    for (i64 from = next_.fetch_add(piece_); from < count_; from = next_.fetch_add(piece_))
      work_(context_, from, std::min(count_, from + piece_));
  }

  // Undoes what a thread inherits from its caller: the binding to one processor, by the program or by OpenMP (OMP_PROC_BIND).
  static void use_all_processors() {
#if defined(__linux__)
    cpu_set_t all;
    CPU_ZERO(&all);
    for (int place = 0; place < omp_get_num_places(); ++place) {
      std::unique_ptr<int[]> ids(new int[omp_get_place_num_procs(place)]);
      omp_get_place_proc_ids(place, ids.get());
      for (int i = 0; i < omp_get_place_num_procs(place); ++i)
        if (ids[i] < CPU_SETSIZE) CPU_SET(ids[i], &all);
    }
    if (omp_get_num_places() || !sched_getaffinity(getpid(), sizeof(all), &all))
      pthread_setaffinity_np(pthread_self(), sizeof(all), &all);
#endif
  }

  std::mutex owner_;
  int started_ = 0;
  void (*work_)(void*, i64, i64) = nullptr;
  void* context_ = nullptr;
  i64 count_ = 0, piece_ = 1;
  int helpers_ = 0;
  alignas(64) std::atomic<i64> next_{0};
  alignas(64) std::atomic<uint32_t> announced_{0};
  std::atomic<bool> open_{false};
  alignas(64) std::atomic<int> inside_{0}, joined_{0};
};

// The process's pool. It lives until the process ends. A forked child has none of its threads, and starts with a new one.
Pool* pool = [] {
  pthread_atfork(nullptr, nullptr, [] {
    pool = new Pool;
    crowded_steps = in_step ? 1 : 0;
  });
  return new Pool;
}();

// Threads that a kernel may use.
inline int thread_count() { return in_step ? in_step : omp_get_max_threads(); }

constexpr i64 EVEN = 0;  // length of the pieces of a loop whose items take equal time

// Calls work(i) for i from 0 to count - 1, in any order, on several threads if `worthwhile`. A thread takes `piece` of them at once.
template <class Work>
void parallel_for(i64 count, i64 piece, bool worthwhile, Work&& work) {
  auto take = [](void* context, i64 from, i64 to) {
    auto& each = *static_cast<std::remove_reference_t<Work>*>(context);
    for (i64 i = from; i < to; ++i) each(i);
  };
  const i64 length = piece == EVEN ? std::max<i64>(1, count / (4 * i64(thread_count()))) : piece;
  const int threads = int(std::min<i64>(thread_count(), (count + length - 1) / length));
  if (threads < 2 || !worthwhile) return take(&work, 0, count);
  if (in_step) {
    if (!pool->run(take, &work, count, length, threads)) take(&work, 0, count);
  } else if (piece == EVEN) {
#pragma omp parallel for schedule(static)
    for (i64 i = 0; i < count; ++i) work(i);
  } else {
#pragma omp parallel for schedule(dynamic, 1)
    for (i64 from = 0; from < count; from += piece) take(&work, from, std::min(count, from + piece));
  }
}

int (*set_mkl_threads)(int) = nullptr;  // `MKL_Set_Num_Threads_Local` of PyTorch's MKL, if it has one

void set_pytorch_threads(int threads) {
  omp_set_num_threads(threads);
  if (set_mkl_threads) set_mkl_threads(threads);
}

}  // namespace

EXPORT void dq_use_mkl(int (*set_threads)(int)) { set_mkl_threads = set_threads; }

// Begins a crowded step: gives the pool to the kernels that this thread calls, and one thread to PyTorch's own loops. Writes the
// number of threads that they had, for `dq_end_step`. Writes 0 and does nothing within a crowded step, of any thread: two would
// take each other's helpers.
EXPORT void dq_begin_step(int* threads) {
  int none = 0;
  *threads = 0;
  if (in_step || !crowded_steps.compare_exchange_strong(none, 1)) return;
  *threads = in_step = omp_get_max_threads();
  set_pytorch_threads(1);
}

EXPORT void dq_end_step(int threads) {
  in_step = 0;
  crowded_steps = 0;
  if (omp_get_max_threads() == 1) set_pytorch_threads(threads);  // else the program has set it meanwhile
}

// Gives PyTorch's own loops `threads` threads within a crowded step; 0 stands for all.
EXPORT void dq_float_threads(int threads) {
  if (in_step) set_pytorch_threads(threads ? threads : in_step);
}
