// What the files of the C interface have in common: exported names, and the threads of torch's own OpenMP.
#pragma once

#include <algorithm>
#include <atomic>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

namespace cospadi {

// What the C interface answers.
enum Status { OK = 0, STREAM_TOO_SHORT = 1, OUT_OF_MEMORY = 2, DAMAGED = 3, NO_LEVEL = 4 };

// GOMP_parallel of the OpenMP runtime that torch has loaded: its threads are ours, so there are never two pools.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);
extern Parallel openmp;

// Runs body(i) for i < tasks on at most `threads` threads.
template <class Body>
void parallel(int tasks, int threads, const Body& body) {
  struct Shared {
    std::atomic<int> next;
    int tasks;
    const Body& body;
  } shared{{0}, tasks, body};
  const auto work = [](void* data) {
    Shared& all = *static_cast<Shared*>(data);
    for (int i; (i = all.next.fetch_add(1, std::memory_order_relaxed)) < all.tasks;) all.body(i);
  };
  threads = std::min(threads, tasks);
  if (openmp && threads > 1) {
    openmp(work, &shared, static_cast<unsigned>(threads), 0);
  } else {
    work(&shared);
  }
}

}  // namespace cospadi
