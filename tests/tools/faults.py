"""Small faults that a careful author might make; `mutations.py` plants them, and the suite catches each."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """``text``, once in ``file``, becomes ``instead``; of the file ``tests`` what ``-k select`` names must fail."""

    name: str
    kind: str
    file: str
    text: str
    instead: str
    tests: str
    select: str

    @property
    def compiled(self) -> bool:
        """Whether the C++ module is to be built anew."""
        return self.file.startswith("csrc/") and not self.on_host

    @property
    def on_host(self) -> bool:
        """A kernel in CUDA C++, which `tests/cuda_on_host` builds and runs."""
        return self.file.endswith(".cuh")


CPU = "csrc/include/rewardops/cpu/"
CUDA = "csrc/include/rewardops/cuda/"

FAULTS = [
    # ---- Python
    Fault(
        "devices without kernels have none at all", "other device", "rewardops/core/dispatch.py",
        '    _library.impl(op, elsewhere, "CompositeExplicitAutograd")\n',
        "",
        "tests/system/test_other_devices.py", "test_every_op_has_a_kernel",
    ),
    Fault(
        "float64 stays where there is none", "other device", "rewardops/core/precision.py",
        "return torch.float32 if value is torch.float64 else value",
        "return value",
        "tests/system/test_other_devices.py", "test_float64_is_replaced_by_float32",
    ),
    Fault(
        "the first token of a packed row counts as the row before's", "off by one", "rewardops/core/rows.py",
        "position, right=True)\n",
        "position, right=False)\n",
        "tests/system/test_layout.py", "expand_spreads",
    ),
    Fault(
        "flags of masked tokens end steps", "dropped mask", "rewardops/reference/segments.py",
        "(by_row & valid)",
        "by_row",
        "tests/ops/test_segments.py", "steps_to_tokens and reference",
    ),
    Fault(
        "the bias has the gradient of the last block of tokens alone", "missing carry", "rewardops/core/heads.py",
        "self.grad_bias[first:end] += g.sum(",
        "self.grad_bias[first:end] = g.sum(",
        "tests/ops/test_linear.py", "matches_float64 and triton and float32",
    ),
    Fault(
        "a tensor of another dtype than its neighbours' is taken", "unchecked kind", "rewardops/core/kinds.py",
        "elif tensor.dtype is not self.real[1]:",
        "elif tensor.dtype is torch.bool:",
        "tests/system/test_fuzz.py", "dtype_of_its_own",
    ),
    Fault(
        "a sparse tensor goes to the kernels", "unchecked kind", "rewardops/core/kinds.py",
        "if tensor.layout is not torch.strided:",
        "if tensor.layout is torch.sparse_csr:",
        "tests/system/test_fuzz.py", "test_conditions and reference and raw",
    ),
    Fault(
        "an index has the default device", "default dtype or device", "rewardops/viz/compressed_tree.py",
        "number[nodes] = torch.arange(len(nodes), device=\"cpu\")",
        "number[nodes] = torch.arange(len(nodes), dtype=torch.int64)",
        "tests/system/test_fuzz.py", "test_conditions and reference and defaults",
    ),
    Fault(
        "discounts have the default dtype", "default dtype or device", "rewardops/reference/td.py",
        "return like.new_full(like.shape, value, dtype=torch.float64)",
        "return like.new_full(like.shape, value, dtype=torch.get_default_dtype()).double()",
        "tests/system/test_default_dtype.py", "do_not_depend and td and reference and padded",
    ),
    Fault(
        "rows that share one element are apart", "shared memory", "rewardops/core/inplace.py",
        "if stride <= reach:",
        "if stride < reach:",
        "tests/system/test_fuzz.py", "memory_that_is_shared",
    ),
    Fault(
        "tensors that begin at other addresses are apart", "shared memory", "rewardops/core/inplace.py",
        "if a_end <= b_start or b_end <= a_start:",
        "if a_start != b_start:",
        "tests/system/test_fuzz.py", "memory_that_is_shared",
    ),
    Fault(
        "an infinite scale makes 0 of a group", "infinity", "rewardops/reference/advantages.py",
        "above = rewards - torch.where(low.isfinite(), low, 0)",
        "above = torch.where(rewards.isfinite(), rewards - torch.where(low.isfinite(), low, 0), 0)",
        "tests/ops/test_advantages_extremes.py", "values_and_gradients and reference",
    ),
    Fault(
        "equal infinities differ by NaN", "infinity", "rewardops/reference/kl.py",
        "return torch.where(a == b, 0, a - b)",
        "return a - b",
        "tests/ops/test_kl_limits.py", "test_every_pair and reference",
    ),
    Fault(
        "masked tokens have the NaN of their row's gradient", "infinity", "rewardops/reference/returns.py",
        "from_rows(torch.where(ends, out, 0), a.rewards.shape",
        "from_rows(out, a.rewards.shape",
        "tests/system/test_fuzz.py", "minus_infinity_among_rewards and reference",
    ),
    Fault(
        "every value of a number is a constant of the graph", "number of a graph", "rewardops/core/scalars.py",
        "has_static_value(args[k]) for k",
        "True for k",
        "tests/system/test_numbers.py", "two_graphs and implicit_rewards",
    ),
    Fault(
        "numbers that travel in a tensor change places", "number of a graph", "rewardops/core/scalars.py",
        "self._with(args[:count], args[count].tolist())",
        "self._with(args[:count], args[count].tolist()[::-1])",
        "tests/system/test_numbers.py", "no_dimensions and token_kl",
    ),
    Fault(
        "a mask of other numbers than 0 and 1 is taken", "unchecked value", "rewardops/core/checks.py",
        "_first(valid & (mask.detach() != 1), None)",
        "_first(valid & (mask.detach() < 0), None)",
        "tests/system/test_fuzz.py", "weights_are_no_mask",
    ),
    Fault(
        "step ids may fall behind a masked token", "unchecked value", "rewardops/core/checks.py",
        "torch.where(counted, ids, -1).cummax(1).values > ids",
        "torch.where(counted, ids, -1).roll(1, 1) > ids",
        "tests/system/test_fuzz.py", "step_ids_fall",
    ),
    Fault(
        "per-token rewards are several per row", "unchecked value", "rewardops/advantages.py",
        "if weights is None and rewards.dim() == 2:",
        "if weights is None and rewards.dim() == 3:",
        "tests/ops/test_advantages_extremes.py", "test_presets",
    ),
    Fault(
        "shares are not divided by the largest weight first", "range", "rewardops/shaping.py",
        "w = w / rows.expand(torch.where(some, size, 1))",
        "w = w * 1",
        "tests/ops/test_shaping.py", "reference and 1e-4",
    ),
    Fault(
        "the larger part of a sum is subtracted from it", "lost digits", "rewardops/prefix_tree.py",
        "yield torch.where(left < 0, forest.tokens(without, total.dtype, **options), less_own)",
        "yield less_own",
        "tests/ops/test_prefix_tree_values.py", "others and reference",
    ),
    Fault(
        "cases without a number pass", "nothing compared", "rewardops/testing/checks.py",
        "    if not report.compared():\n",
        "    if not report.comparisons:\n",
        "tests/system/test_testing.py", "nothing_to_compare",
    ),
    # ---- Triton
    Fault(
        "the sum behind the entropy stays relative to the old maximum", "lost rescale",
        "triton_kernels/logits_lanes.py",
        "weighted = add_to(moved(weighted, total, step), factor,",
        "weighted = add_to(weighted, factor,",
        "tests/ops/test_logits.py", "test_matches_float64 and triton and 5003 and float32",
    ),
    Fault(
        "the offset of a row of logits is taken in 32 bits", "32-bit offset", "triton_kernels/logits_rows.py",
        "(n // inner).to(tl.int64) * stride_outer",
        "(n // inner) * stride_outer",
        "tests/ops/test_logits.py", "row_offsets and triton",
    ),
    Fault(
        "the gradient passes through the clamp of the difference", "wrong comparison", "triton_kernels/kl.py",
        "outside = (tl.abs(whole) > limits.difference) |",
        "outside = (tl.abs(d) > limits.difference) |",
        "tests/ops/test_kl.py", "every_option and triton and k3",
    ),
    Fault(
        "a quantile between two rewards is the lower one", "off by one", "triton_kernels/group_statistics.py",
        "tl.where(at_most > rank + 1, value,",
        "tl.where(at_most >= rank + 1, value,",
        "tests/ops/test_advantages.py", "matches_float64_and_the_loop and triton and 1-none-0.3",
    ),
    Fault(
        "masked tokens are counted among a position's", "dropped mask", "triton_kernels/entropy.py",
        "return Sums(sums.count + valid.to(weight.dtype),",
        "return Sums(sums.count + 1.0,",
        "tests/ops/test_entropy.py", "matches_the_loop and triton",
    ),
    Fault(
        "sums that cancel are not taken again in float64", "cancellation", "triton_kernels/scopes_standard.py",
        "lost = (lost | (m.top < LEAST)) & (m.top > 0.0)",
        "lost = (m.top < LEAST) & (m.top > 0.0)",
        "tests/ops/test_entropy_scopes.py", "far_from_all_others and triton",
    ),
    Fault(
        "a NaN does not stay in the smallest return", "wrong comparison", "triton_kernels/scans.py",
        "tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)",
        "tl.minimum(a, b)",
        "tests/ops/test_returns.py", "nan_and_infinite and triton",
    ),
    Fault(
        "the aggregate of a chunk ends the step that goes on behind it", "missing carry",
        "triton_kernels/returns.py",
        "if KIND == IDS and STAGE != WHOLE:",
        "if KIND == IDS and STAGE == RESUMED:",
        "tests/ops/test_returns.py", "blocks_and_chunks and triton",
    ),
    Fault(
        "a block looks ahead to a masked token's value", "dropped mask", "triton_kernels/td_forward.py",
        "value = tl.where(valid[at], v[at].to(ACC), value)",
        "value = v[at].to(ACC)",
        "tests/ops/test_td.py", "few_long_rows and triton",
    ),
    Fault(
        "the last of equal extremes takes the gradient", "tie", "triton_kernels/segments_open.py",
        "tie & (b_more < a_more)",
        "tie",
        "tests/ops/test_segments.py", "equal_extremes and triton",
    ),
    Fault(
        "zeros of both signs are no tie", "tie", "triton_kernels/selection.py",
        "    x = x + 0.0\n",
        "",
        "tests/ops/test_selection.py", "by_sorting and triton and ties",
    ),
    Fault(
        "a row that ends where others part has a node of its own", "off by one", "triton_kernels/prefix_tree.py",
        "is_alone = length > tl.maximum(depth, 0)",
        "is_alone = length >= tl.maximum(depth, 0)",
        "tests/ops/test_prefix_tree.py", "every_backend_builds and triton-cpu-0",
    ),
    Fault(
        "of equal children behind the first block the last is chosen", "tie", "triton_kernels/tree.py",
        "(chosen < 0) & (first < end)",
        "first < end",
        "tests/ops/test_tree.py", "equal_children and triton",
    ),
    # ---- C++ that is compiled once
    Fault(
        "a row without a valid token is a member of its group", "dropped mask", "csrc/cpu/advantages.cpp",
        "live[b] = mask ? n > 0 && std::memchr(mask, 1, n) != nullptr : n > 0;",
        "live[b] = n > 0;",
        "tests/ops/test_advantages.py", "test_to_tokens and cpp and mean",
    ),
    Fault(
        "the last of equal rewards takes the baseline's gradient", "tie", "csrc/cpu/advantages.cpp",
        "if (pick.row < 0 && static_cast<double>(a.rewards[b]) == value)",
        "if (static_cast<double>(a.rewards[b]) == value)",
        "tests/ops/test_advantages.py", "matches_float64_and_the_loop and cpp",
    ),
    Fault(
        "a product of two zeros has a gradient", "off by one", "csrc/cpu/segments.cpp",
        "kept = zeros > 1 ? 0 : value;",
        "kept = zeros > 2 ? 0 : value;",
        "tests/ops/test_segments.py", "products and cpp",
    ),
    Fault(
        "one tie too many is chosen", "off by one", "csrc/cpu/selection.cpp",
        "(key == least && room > 0)",
        "(key == least && room >= 0)",
        "tests/ops/test_selection.py", "by_sorting and cpp",
    ),
    Fault(
        "rows share what their last neighbours do, not the least on the way", "missing carry",
        "csrc/cpu/prefix_tree.cpp",
        "put(q - 1, least = std::min(least, tree.shared[q]))",
        "put(q - 1, tree.shared[q])",
        "tests/ops/test_prefix_tree.py", "lcp_of_all_pairs and cpp",
    ),
    Fault(
        "the weights of a soft maximum stay relative to the old largest", "lost rescale", "csrc/cpu/tree.cpp",
        "s.weight = s.weight * fade + e;",
        "s.weight += e;",
        "tests/ops/test_tree.py", "matches_recursion and cpp and softmax",
    ),
    # ---- C++ that is compiled for every instruction set
    Fault(
        "the sum behind the KL stays relative to the old maximum", "lost rescale", f"{CPU}logits_sums.h",
        "kl = factor * (kl + total * gap);",
        "kl *= factor;",
        "tests/ops/test_logits.py", "test_pairs_match_float64 and cpp and 5003 and float32",
    ),
    Fault(
        "the quick way takes a logit of -inf", "wrong comparison", f"{CPU}logits_sums.h",
        "if (!(below.all_negative() && t + w - (t + w) == 0)) return false;",
        "if (!below.all_negative()) return false;",
        "tests/ops/test_logits.py", "test_minus_infinity and cpp",
    ),
    Fault(
        "masked tokens have a gradient in the reference's log-probability", "dropped mask", f"{CPU}kl.h",
        "  if (a.mask)\n#pragma omp simd\n    for (int64_t k = 0; k < n; ++k) buffer[k] =",
        "  if (a.mask && out != a.out_ref)\n#pragma omp simd\n    for (int64_t k = 0; k < n; ++k) buffer[k] =",
        "tests/ops/test_kl.py", "masked_tokens and cpp",
    ),
    Fault(
        "a group starts from the sums of the one before", "stale state", f"{CPU}entropy.h",
        "block.count[c][k] = block.total[c][k] = block.through[c][k] = 0;",
        "block.count[c][k] = block.total[c][k] = 0;",
        "tests/ops/test_entropy.py", "test_matches_float64 and cpp",
    ),
    Fault(
        "moments are merged as if their means were equal", "lost term", "csrc/cpu/scopes.cpp",
        "a.squares + b.squares + apart * apart * (a.count * (b.count / count))",
        "a.squares + b.squares",
        "tests/ops/test_advantages_whiten.py", "hard_inputs and cpp and plain",
    ),
    Fault(
        "the id behind a block is that of a masked token", "dropped mask", f"{CPU}returns_steps.h",
        "    while (end < size && !valid(end)) ++end;\n",
        "",
        "tests/ops/test_returns.py", "blocks_and_chunks and cpp",
    ),
    Fault(
        "a chunk multiplies its carry by the last block's factor alone", "missing carry", f"{CPU}td.h",
        "carry = scan_block<FromRight>(row, uniform, n, s, carry);\n    if (product)\n      *product *= uniform",
        "carry = scan_block<FromRight>(row, uniform, n, s, carry);\n    if (product)\n      *product = uniform",
        "tests/ops/test_td.py", "few_long_rows and cpp",
    ),
    # ---- CUDA C++
    Fault(
        "warps do not hand their sums on", "missing carry", f"{CUDA}scan.cuh",
        "    if (w == warp()) before = Map::then(total, before);\n",
        "",
        "tests/ops/test_td.py", "gae_matches_float64 and cuda and 150 and float32",
    ),
    Fault(
        "a lane takes its own id for the next one's", "off by one", f"{CUDA}returns.cuh",
        "some & ~((2u << lane()) - 1)",
        "some & ~((1u << lane()) - 1)",
        "tests/ops/test_returns.py", "min_matches_the_loop and cuda and ids",
    ),
    Fault(
        "a warp's sum behind the entropy stays relative to its own maximum", "lost rescale", f"{CUDA}logits.cuh",
        "factor * fmaf(bounded(gap), total, part.weighted)",
        "factor * part.weighted",
        "tests/ops/test_logits_known_loss.py", "matches_autograd and cuda and 5003 and float32",
    ),
    Fault(
        "what a warp has seen so far is not the limit of what it sees next", "missing carry",
        f"{CUDA}prefix_tree.cuh",
        "    least = from_lane(shared, kWarp - 1);\n",
        "",
        "tests/ops/test_prefix_tree.py", "lcp_of_a_large_group and cuda",
    ),
    Fault(
        "masked tokens in front of a row's vectors have a gradient", "dropped mask", f"{CUDA}advantages.cuh",
        "if (line.valid(t)) lanes[0] += line.data[t];",
        "lanes[0] += line.data[t];",
        "tests/ops/test_advantages.py", "tokens_at_every_alignment",
    ),
    Fault(
        "a row with a token among its first is a member, valid or not", "dropped mask", f"{CUDA}group_members.cuh",
        "any |= t < end - mask && mask[t];",
        "any |= t < end - mask;",
        "tests/ops/test_advantages.py", "test_to_tokens and cuda and std-mean",
    ),
    Fault(
        "the std of a group divides by its size", "off by one", f"{CUDA}group_statistics.cuh",
        "max(s.n - ddof, 1.0)",
        "max(s.n, 1.0)",
        "tests/ops/test_advantages.py", "matches_float64_and_the_loop and cuda and 1-std-mean",
    ),
    Fault(
        "the tokens of a tile stay among those in front of it", "missing carry", f"{CUDA}tree_tokens.cuh",
        "      before -= total.n;\n",
        "",
        "tests/ops/test_prefix_tree.py", "tokens_of_nodes and cuda",
    ),
    Fault(
        "the columns behind the packs are all the first of them", "off by one", f"{CUDA}logits_slice.cuh",
        "slice[k] = row[k];",
        "slice[k] = row[count / kPack<T> * kPack<T>];",
        "tests/ops/test_logits_known_loss.py", "matches_autograd and cuda and 5003 and float32",
    ),
    Fault(
        "tokens that are read together are all valid", "dropped mask", f"{CUDA}rows.cuh",
        "valid |= (four.at[i] != 0) << i;",
        "valid |= 1u << i;",
        "tests/ops/test_td.py", "gae_matches_float64 and cuda and 150 and float32",
    ),
    Fault(
        "a hit counts as the first element of its pack", "off by one", f"{CUDA}search.cuh",
        "first = rank * kEach + __ffs(static_cast<int>(hits)) - 1;",
        "first = rank * kEach;",
        "tests/ops/test_prefix_tree.py", "tokens_far_from_the_ends_of_a_row and cuda",
    ),
]  # fmt: skip
