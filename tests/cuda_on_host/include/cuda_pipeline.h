// Copies to shared memory that a thread does not wait for. They take place where it does, as late as they may.
#pragma once

#include "../cuda_on_host.h"

inline void __pipeline_memcpy_async(void* shared, const void* global, size_t size) {
  cuda_on_host::block->copies[cuda_on_host::thread].push_back({shared, global, size});
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(size_t groups) {
  if (groups) cuda_on_host::fail("__pipeline_wait_prior for some of the copies");
  auto& copies = cuda_on_host::block->copies[cuda_on_host::thread];
  for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.size);
  copies.clear();
}
