// Group-relative advantages of rows, or of all their tokens, from rewards and labels per row; and the gradients.
//
// group_advantages_kernel: a block serves a few neighbouring rows, or a part of the tokens of one. It reads the labels
//   of all rows once, lists the members of its rows' groups in shared memory, reduces each of those groups once, and
//   writes the rows' tokens. Bits depend on a group's members (of more than kListed, on their rows too), not on how the
//   rows are shared between blocks.
// row_sums_kernel, group_advantages_backward_kernel: the gradients of tokens, summed by row; then the same reductions.
//
// Bytes, for 512 rows of 8192 tokens in float32: 4.2 MB of mask and 16.8 MB of tokens, 21 MB or 4.9 us at 4.3 TB/s, in
// either direction. For 8192 rows of 1024: 42 MB or 9.8 us. Besides, from the L2 cache: the labels, 8 bytes for each
// row and block, 2 MB and 27 MB in all, and a sector of mask for each member. All of these reads precede the first
// store, so that they cost latency: about 3 us. Without tokens, this latency is the whole cost.
//
// Why not Triton: a program cannot keep a list of the members. It reads labels and masks again for each pass over a
// group (3 for a std, 35 for a median, 67 in float64) and each row of it, and all labels for every row: 537 MB
// from L2 for the 8192 rows.
#pragma once

#include "rewardops/cuda/group_statistics.cuh"
#include "rewardops/cuda/rows.cuh"

namespace rewardops::cuda::advantages {

// ---- tokens ------------------------------------------------------------------------------------------------

// Writes part blockIdx.y of the tokens of `rows` rows, from row `first` on: the row's value, or 0 at masked tokens.
template <typename T>
__device__ void write_tokens(const AdvantagesArgs<T>& a, const T* values, int first, int rows) {
  const auto parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
  const int warps = kWarps * parts, rank = part * kWarps + warp();
  for (int k = 0; k < rows; ++k) {
    const int row = first + k;
    const T value = values[k];
    // Rows of zeros, as in groups of equal rewards, need no mask.
    const uint8_t* mask = value == 0 ? nullptr : a.mask.row(a.rows, row);
    const RowChunks<T> line(a.out.row(a.rows, row), mask, a.rows.size(row));
    // Each row starts with another warp, so that short ones are shared evenly.
    const int chunk = (rank + warps - k % warps) % warps;
    line.visit(
        chunk, warps, [&](int64_t t) { line.data[t] = value != 0 && line.valid(t) ? value : T{0}; },
        [&](int64_t t, auto n) {
          constexpr int count = decltype(n)::value;
          Pack<uint8_t, kItems> flags[count];
#pragma unroll
          for (int v = 0; v < count; ++v) flags[v] = line.flags(t + v * line.kStride);
#pragma unroll
          for (int v = 0; v < count; ++v) {
            Pack<T, kItems> out;
#pragma unroll
            for (int i = 0; i < kItems; ++i) out.at[i] = value != 0 && flags[v].at[i] ? value : T{0};
            *line.pack(t + v * line.kStride) = out;
          }
        });
  }
}

// Block (b, k): the gradients of the valid tokens of row b, summed over the chunks of part k.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks) row_sums_kernel(const __grid_constant__ AdvantagesArgs<T> a) {
  const int64_t row = blockIdx.x;
  const auto parts = static_cast<int>(gridDim.y), part = static_cast<int>(blockIdx.y);
  const RowChunks<const T> line(a.grad.row(a.rows, row), a.mask.row(a.rows, row), a.rows.size(row));
  double lanes[kItems] = {};
  line.visit(
      part * kWarps + warp(), kWarps * parts,
      [&](int64_t t) {
        if (line.valid(t)) lanes[0] += line.data[t];
      },
      [&](int64_t t, auto n) {
        constexpr int count = decltype(n)::value;
        Pack<uint8_t, kItems> flags[count];
        Pack<T, kItems> grads[count];
#pragma unroll
        for (int v = 0; v < count; ++v) {
          flags[v] = line.flags(t + v * line.kStride);
          grads[v] = *line.pack(t + v * line.kStride);
        }
#pragma unroll
        for (int v = 0; v < count; ++v)
#pragma unroll
          for (int i = 0; i < kItems; ++i) lanes[i] += flags[v].at[i] ? static_cast<double>(grads[v].at[i]) : 0.0;
      });
  const double sum = reduce_block((lanes[0] + lanes[1]) + (lanes[2] + lanes[3]), Add());
  if (threadIdx.x == 0) a.sums[row * parts + part] = sum;
}

// ---- advantages --------------------------------------------------------------------------------------------

// Fills shared.results for the block's rows: visit(member, statistics, k) writes those of row k; rows that are not
// members keep 0.
template <bool kBackward, typename T, typename Visit>
__device__ void for_rows(const AdvantagesArgs<T>& a, Shared<T>& shared, int first, int rows, Visit visit) {
  if (static_cast<int>(threadIdx.x) < rows)
    for (auto& result : shared.results) result[threadIdx.x] = 0;
  Sets<T, kBackward> sets(a, shared, first, rows);
  while (sets.next()) {
    GroupStatistics s;
    if (is_relative(a)) {
      summarize(sets.members, a.ddof, a.scale == Scale::std || sets.whole, shared.summaries[sets.whole]);
      if constexpr (kBackward) sum_upstream(a, sets.members, shared.upstream[sets.whole]);
      if (sets.whole) continue;
      s = statistics_of(a, sets.members);
    }
    sets.members.each([&](const Member<T>& m) {
      if (m.row >= first && m.row < first + rows) visit(m, s, m.row - first);
    });
  }
  __syncthreads();
}

// Block (i, k): the `each` rows from i * each on, and of their tokens part k.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_advantages_kernel(const __grid_constant__ AdvantagesArgs<T> a, int each) {
  __shared__ Shared<T> shared;
  const int first = static_cast<int>(blockIdx.x) * each, rows = min(each, static_cast<int>(a.rows.batch) - first);
  for_rows<false>(a, shared, first, rows, [&](const Member<T>& m, const GroupStatistics& s, int k) {
    const double value = numerator(a, s, m);
    shared.results[0][k] = static_cast<T>(value * s.inv_scale + 0.0);  // no negative zeros
    shared.results[1][k] = static_cast<T>(s.inv_scale);
    shared.results[2][k] = static_cast<T>(value);
  });
  if (const int k = threadIdx.x; k < rows && blockIdx.y == 0) {
    if (!a.tokens_given) a.advantages[first + k] = shared.results[0][k];
    a.inv_scale[first + k] = shared.results[1][k];
    a.numerators[first + k] = shared.results[2][k];
  }
  if (a.tokens_given) write_tokens(a, shared.results[0], first, rows);
}

// Block i: the gradients of the rewards, and of the baselines where they are arguments, of the `each` rows from i *
// each on.
template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks)
    group_advantages_backward_kernel(const __grid_constant__ AdvantagesArgs<T> a, int each) {
  __shared__ Shared<T> shared;
  const int first = static_cast<int>(blockIdx.x) * each, rows = min(each, static_cast<int>(a.rows.batch) - first);
  const bool relative = is_relative(a), second = a.baseline == Baseline::second_max;
  const int of_scale = a.scale == Scale::batch_std;
  for_rows<true>(a, shared, first, rows, [&](const Member<T>& m, const GroupStatistics& s, int k) {
    const double up = upstream(a, m.row), through = relative ? shared.upstream[of_scale][1] : 0;
    double gain = s.gain, total = relative ? shared.upstream[0][0] : 0;
    if (second) {
      gain = m.row == s.earliest[kHighest];
      total = s.earliest[kHighest] < 0 ? 0 : upstream(a, s.earliest[kHighest]);
    }
    double grad = s.inv_scale * (gain * up - baseline_slope(a, s, m.row) * total);
    if (a.scale != Scale::none)
      grad -= through * s.inv_scale * s.inv_scale * scale_slope(a, s, shared.summaries[of_scale], m);
    shared.results[0][k] = static_cast<T>(s.alone ? up : grad);
    shared.results[1][k] = static_cast<T>(s.alone ? 0 : -s.inv_scale * up);
  });
  if (const int k = threadIdx.x; k < rows) {
    a.grad_rewards[first + k] = shared.results[0][k];
    if (a.grad_baseline) a.grad_baseline[first + k] = shared.results[1][k];
  }
}

}  // namespace rewardops::cuda::advantages
