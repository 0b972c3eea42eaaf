"""The prefix trees of a batch: validated tokens, and the family's ops as methods of the trees."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..core import checks
from ..core.checks import Number
from ..core.groups import GroupSize, Labels, group_ids
from ..core.rows import Layout
from ..core.settings import may_read
from ..reference.prefix_tree import NodeTokensArgs, PrefixTreeArgs, SubtreeArgs, SubtreeStatistics
from . import prefix_tree as ops
from . import tree

MASKED = ("prefix", "skip")


@dataclass(frozen=True)
class TokenRows:
    """Validated tokens, group labels and layout. Launches nothing."""

    tokens: Tensor
    labels: Tensor
    layout: Layout
    masked: str

    @staticmethod
    def of(
        tokens: Tensor,
        groups: Labels,
        group_size: GroupSize,
        mask: Tensor | None,
        cu_seqlens: Tensor | None,
        masked: str,
    ) -> TokenRows:
        checks.check_integer("tokens", tokens)
        checks.check_choice("masked", masked, MASKED)
        rows = checks.token_layout("tokens", tokens, mask, cu_seqlens)
        labels = group_ids(groups, group_size, rows.batch, tokens.device, "tokens")
        return TokenRows(tokens, labels, rows, masked)

    def forest(self) -> Forest:
        """The prefix trees of the groups."""
        skip = self.masked == "skip"
        args = PrefixTreeArgs(self.tokens, self.labels, self.layout.mask, self.layout.cu_seqlens, skip)
        rows, nodes = ops.prefix_tree(*args)
        return Forest(rows, nodes, self.layout, skip)


@dataclass(frozen=True)
class Forest:
    """The prefix trees of a batch: arrays of rows and nodes, and the layout of the tokens."""

    rows: Tensor
    nodes: Tensor
    layout: Layout
    skip: bool  # True: masked tokens between valid ones are left out

    @property
    def leaf(self) -> Tensor:
        return self.rows[1]

    @property
    def live(self) -> Tensor:
        """``[B]``: rows that have a token."""
        return self.rows[3] > 0

    @property
    def depth(self) -> Tensor:
        return self.nodes[2]

    @property
    def count(self) -> Tensor:
        """``[2 B]``: the number of rows that share each node."""
        return self.nodes[1] - self.nodes[0]

    @property
    def parent(self) -> Tensor:
        return self.nodes[3]

    def statistics(
        self, x: Tensor, weights: Tensor | None, statistic: str, gamma: Number = 1.0, ddof: int = 0
    ) -> SubtreeStatistics:
        """A statistic of each node's rows, and their total weight ``[2 B, 1]``; see ``reference.prefix_tree``."""
        args = SubtreeArgs(x, weights, self.rows, self.nodes, gamma, statistic, ddof)
        return SubtreeStatistics(*ops.subtree_statistics(*args))

    def sums(self, x: Tensor, weights: Tensor | None = None, gamma: Number = 1.0) -> Tensor:
        """``[2 B, C]``: sums over each node's rows of discounted ``x``."""
        return self.statistics(x, weights, "sum", gamma).out

    def means(self, x: Tensor, weights: Tensor | None = None, gamma: Number = 1.0) -> Tensor:
        """``[2 B, C]``: means over each node's rows; 0 where their weights sum to 0."""
        return self.statistics(x, weights, "mean", gamma).out

    def std(self, x: Tensor, weights: Tensor | None, ddof: int) -> Tensor:
        """``[2 B, C]``: standard deviation over each node's rows; 0 for at most ``ddof`` rows."""
        return self.statistics(x, weights, "std", ddof=ddof).out

    def supported_by(self, count: int) -> Tensor:
        """``[B]``: the deepest node of each row that ``count`` rows share; the top where there is none."""
        node = torch.arange(self.parent.shape[0], device=self.parent.device)
        self_or_up = torch.where((self.count >= count) | (self.parent < 0), node, self.parent)
        return torch.where(self.leaf >= 0, tree.path_ends(self_or_up)[self.leaf.clamp(min=0)], -1)

    def tokens(
        self,
        values: Tensor | None,
        dtype: torch.dtype,
        *,
        at: str = "after",
        scaled_values: Tensor | None = None,
        row_bias: Tensor | None = None,
        row_factor: Tensor | None = None,
        gamma: Number = 1.0,
        leaf: Tensor | None = None,
    ) -> Tensor:
        """``row_bias + values + row_factor * scaled_values`` at each token's row and state; 0 where masked.

        Args:
            values, scaled_values: ``[2 B, C]`` float64, discounted from the node's depth to the state.
            row_bias, row_factor: ``[B, C]`` float32 or float64; the factor is discounted from the row's end.
            at: ``"before"``, ``"after"``, or ``"step"``, the difference of the two.
            leaf: ``[B]``, the node at which a row's path ends; tokens after it have its value.

        Returns:
            ``[C, *tokens]``.
        """
        rows, layout = self.rows, self.layout
        if leaf is not None:
            rows = torch.cat([rows[:1], leaf[None], rows[2:]])
        args = NodeTokensArgs(
            values, scaled_values, row_bias, row_factor, rows, self.nodes, layout.mask, layout.cu_seqlens,
            self.skip, layout.shape[-1], at, gamma,
        )  # fmt: skip
        out: Tensor = ops.nodes_to_tokens(*args, dtype)
        return out


# ---- arguments ---------------------------------------------------------------------------------------------


def checked_rewards(rewards: Tensor, rows: TokenRows) -> tuple[Tensor, torch.dtype, bool]:
    """Validated rewards ``[B, C]`` in the dtype of the result, that dtype, and whether the caller has channels."""
    checks.check_float("rewards", rewards)
    if rewards.dim() not in (1, 2):
        raise ValueError(f"rewards: got shape {checks.show(rewards.shape)}, want [B] or [B, R]")
    want = (rows.layout.batch, *rewards.shape[1:])
    checks.check_shape("rewards", rewards, want, "one per row of tokens")
    checks.check_device("rewards", rewards, rows.tokens.device, "tokens")
    checks.check_values("rewards", rewards)
    (promoted,) = checks.promote(rewards)
    channels = rewards.dim() == 2
    return promoted if channels else promoted[:, None], promoted.dtype, channels


def checked_weights(weights: Tensor | None, rows: TokenRows) -> Tensor | None:
    """Validated weights ``[B]``, float32 or float64."""
    if weights is None:
        return None
    checks.check_float("weights", weights)
    checks.check_shape("weights", weights, (rows.layout.batch,), "one per row of tokens")
    checks.check_device("weights", weights, rows.tokens.device, "tokens")
    if may_read(weights) and bool((weights < 0).any()):
        raise ValueError(f"weights: got {float(weights.min())}, want no negative weight")
    return checks.promote(weights)[0]
