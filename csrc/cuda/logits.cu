#include "cuda/logits.h"

#include <algorithm>

#include "cuda/launch.h"
#include "rewardops/cuda/logits.cuh"

namespace rewardops::cuda {
namespace {

using logits::Terms;

constexpr int64_t kMostBlocks = 8;  // blocks of the largest cluster that every device with clusters can launch
constexpr int64_t kPacks = 20;      // packs of a slice per thread, at most where it has fewer than kThreads
constexpr int64_t kResident = 5;    // blocks of slices of comfortable size that share a multiprocessor
constexpr int64_t kMostRows = 8;    // rows that a cluster takes in sequence, at most
constexpr int64_t kWaves = 16;      // with fewer waves of clusters, a cluster takes fewer rows
constexpr int kAllShared = 100;     // per cent of a multiprocessor's memory as shared memory, none as cache

int64_t divided(int64_t n, int64_t by) { return (n + by - 1) / by; }

// The slices of a row in `blocks` blocks: for each block its packs, threads and bytes of shared memory.
struct Slices {
  int64_t packs, threads, shared;

  Slices(int64_t element, int64_t vocab, int64_t blocks) {
    const int64_t pack = logits::kPackBytes / element;
    packs = divided(divided(vocab, pack), blocks);
    threads = std::min<int64_t>(divided(packs, kPacks * kWarp) * kWarp, int64_t{kThreads});
    shared = logits::shared_before_slice(blocks, threads / kWarp) + packs * logits::kPackBytes;
  }
};

template <typename T, Terms kTerms, bool kCapped>
void run(const TokenStatsAndGradArgs& a, int blocks, void* stream) {
  const Slices slices(sizeof(T), a.in.vocab, blocks);
  const int64_t at_once = std::max<int64_t>(kResident * attribute(cudaDevAttrMultiProcessorCount) / blocks, 1);
  const int64_t each = std::clamp<int64_t>(a.count / (kWaves * at_once), 1, kMostRows);
  const Grid grid{divided(a.count, each) * blocks, 1, static_cast<unsigned>(slices.threads),
                  static_cast<size_t>(slices.shared), static_cast<unsigned>(blocks)};
  const char* const name = "token_stats_and_grad";
  const auto kernel = logits::token_stats_and_grad_kernel<T, kTerms, kCapped>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, kAllShared), name);
  launch(name, kernel, grid, stream, a, static_cast<int>(slices.packs * logits::kPack<T>));
}

// With a softcap, whose registers and time dominate, one kernel serves all statistics.
template <typename T>
void run(const TokenStatsAndGradArgs& a, int blocks, void* stream) {
  const auto wanted = [&](Output o) { return a.outputs[o] || a.coefficients[o]; };
  if (a.in.softcap > 0) return run<T, Terms::moments, true>(a, blocks, stream);
  if (wanted(kSumSq) || wanted(kSumSqLogprob) || wanted(kMeanLogit))
    return run<T, Terms::moments, false>(a, blocks, stream);
  if (wanted(kEntropy)) return run<T, Terms::entropy, false>(a, blocks, stream);
  run<T, Terms::total, false>(a, blocks, stream);
}

}  // namespace

int blocks_of_a_row(int64_t element, int64_t vocab, int64_t comfortable) {
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int64_t largest = attribute(cudaDevAttrComputeCapabilityMajor) >= 9 ? kMostBlocks : 1;
  int64_t blocks = 1;
  const auto shared = [&] { return Slices(element, vocab, blocks).shared; };
  while (blocks < largest && shared() > std::min(comfortable, most)) blocks *= 2;
  return shared() > most ? 0 : static_cast<int>(blocks);
}

void token_stats_and_grad(const TokenStatsAndGradArgs& a, int blocks, void* stream) {
  switch (a.in.logits.dtype) {
    case DType::bf16: return run<__nv_bfloat16>(a, blocks, stream);
    case DType::f16: return run<__half>(a, blocks, stream);
    default: return run<float>(a, blocks, stream);
  }
}

}  // namespace rewardops::cuda
