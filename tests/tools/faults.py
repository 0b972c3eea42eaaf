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
        "the first token of a packed row counts as the row before's", "off by one", "rewardops/core/rows.py",
        "position, right=True)\n",
        "position, right=False)\n",
        "tests/system/test_layout.py", "expand_spreads",
    ),
    Fault(
        "flags of masked tokens end steps", "dropped mask", "rewardops/segments.py",
        "(markers if rows.mask is None else markers & rows.mask)",
        "markers",
        "tests/ops/test_segments.py", "steps_to_tokens and reference",
    ),
    Fault(
        "the bias has the gradient of the last block of tokens alone", "missing carry", "rewardops/core/heads.py",
        "self.grad_bias[first:end] += g.sum(",
        "self.grad_bias[first:end] = g.sum(",
        "tests/ops/test_linear.py", "matches_float64 and triton and float32",
    ),
    # ---- Triton
    Fault(
        "the sum behind the entropy stays relative to the old maximum", "lost rescale",
        "triton_kernels/logits_forward.py",
        "weighted = factor * (weighted + total * gap * scale.to(tl.float64))",
        "weighted = factor * weighted",
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
        "not_clamped = tl.abs(difference) <=",
        "not_clamped = tl.abs(d) <=",
        "tests/ops/test_kl.py", "every_option and triton and k3",
    ),
    Fault(
        "a quantile between two rewards is the lower one", "off by one", "triton_kernels/group_statistics.py",
        "tl.where(at_most > rank + 1, value, above)",
        "tl.where(at_most >= rank + 1, value, above)",
        "tests/ops/test_advantages.py", "matches_float64_and_the_loop and triton and 1-none-0.3",
    ),
    Fault(
        "masked tokens are counted among a position's", "dropped mask", "triton_kernels/entropy.py",
        "one = valid.to(ACC)",
        "one = (at < length).to(ACC)",
        "tests/ops/test_entropy.py", "matches_the_loop and triton",
    ),
    Fault(
        "a NaN does not stay in the smallest return", "wrong comparison", "triton_kernels/returns.py",
        " | (b <= a) | (b != b))",
        " | (b <= a))",
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
        "carry = tl.where(last_valid != 0, carry, last_of(ahead, BLOCK))",
        "carry = last_of(v, BLOCK)",
        "tests/ops/test_td.py", "few_long_rows and triton",
    ),
    Fault(
        "the last of equal extremes takes the gradient", "tie", "triton_kernels/segments.py",
        "(least < value)",
        "(least <= value)",
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
        "buffer[k] = grad[k] * a.scale * g;\n    }\n    if (a.mask)",
        "buffer[k] = grad[k] * a.scale * g;\n    }\n    if (a.mask && !kRef)",
        "tests/ops/test_kl.py", "masked_tokens and cpp",
    ),
    Fault(
        "a group starts from the sums of the one before", "stale state", f"{CPU}entropy.h",
        "block.count[c][k] = block.total[c][k] = block.through[c][k] = 0;",
        "block.count[c][k] = block.total[c][k] = 0;",
        "tests/ops/test_entropy.py", "test_matches_float64 and cpp",
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
        "times(factor, part.weighted + gap * scale * part.total)",
        "times(factor, part.weighted)",
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
        "slice[one] = row[one];",
        "slice[one] = row[packs * kPack<T>];",
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
