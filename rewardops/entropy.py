"""Entropy: rewards, advantages and weights of tokens from their entropy."""

from __future__ import annotations

import torch
from torch import Tensor

from .core import checks
from .core.checks import Number
from .core.groups import GroupSize, Labels, group_ids
from .ops import entropy as ops
from .ops import scopes
from .ops.segments import row_sums
from .segments import TokenValues, defined
from .selection import largest, scope_counts, scope_ids, scope_of_rows

__all__ = [
    "advantage_logprob_cov", "entropy_bonus", "entropy_change", "entropy_reward", "entropy_weights",
    "grpo_s_rewards", "gtpo_rewards", "signed_group_normalize", "steer_metric", "steer_weights",
    "unlikeliness_rewards",
]  # fmt: skip


def gtpo_rewards(
    rewards: Tensor,
    entropy: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    alpha1: float | Tensor = 1.0,
    alpha2: float | Tensor = 0.1,
    positive: float | Tensor | None = None,
    entropy_floor: float | Tensor = 1e-2,
    entropy_grad: bool = False,
) -> Tensor:
    """Token rewards of GTPO: a row's reward, shaped by each token's share of its class's entropy.

    Within a group, at each position ``t`` (counted from the row's start, masked tokens too), let P be the
    right rows and N the wrong rows with a valid token there (arXiv 2508.04349, eq. 3 and 5):

    - right row i: ``alpha1 * rewards[i] + alpha2 * |P| * H[i, t] / sum over P of H[k, t]``
    - wrong row j: ``-alpha1 - alpha2 * |N| * (1 / H[j, t]) / sum over N of (1 / H[k, t])``

    so right rows are paid more where they were uncertain, wrong rows are charged more where they were sure.
    The mean over a class at a position does not depend on the entropies: mass is conserved. Where all entropies of
    the right rows are 0, their shares are equal. The entropies of wrong rows are floored first: without a floor one
    token of near-zero entropy takes the whole charge of its position. The paper has no floor but an epsilon of 1e-8
    in the denominators, which is ``entropy_floor=1e-8`` here (its clamp to [0.2, 0.28] is optional).

    Args:
        rewards: ``[B]``, the outcome of each row; float32, bfloat16, float16 or float64.
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``: the entropy of the behaviour policy at each
            token, in nats, as :func:`rewardops.token_stats` returns it.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        mask: the shape of ``entropy``; bool, integer or float 0/1; masked tokens may lie between valid ones.
            None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        alpha1: weight of the outcome.
        alpha2: weight of the entropy's share.
        positive: rows with a reward above this are right, the others wrong; None for 0.
        entropy_floor: in wrong rows, entropies below it are raised to it; above 0, by default 0.01 nats.
        entropy_grad: let the gradient flow into ``entropy`` too. Off by default: a gradient through the
            weights is a hidden entropy term in the loss.

    Returns:
        The layout of ``entropy``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards`` (right rows), and in ``entropy`` with ``entropy_grad``. An entropy that is not finite makes
        its class NaN at its position, in results and gradients; so does a NaN reward, which counts as a wrong
        row's.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, a
            number out of its range.

    Example:
        >>> entropy = torch.tensor([[1.0, 3.0], [3.0, 1.0], [0.5, 2.0]])
        >>> shaped = ro.gtpo_rewards(torch.tensor([1.0, 1.0, 0.0]), entropy, group_size=3)
        >>> [[round(x, 2) for x in row] for row in shaped.tolist()]
        [[1.05, 1.15], [1.15, 1.05], [-1.1, -1.1]]
    """
    checks.check_rewards(rewards)
    checks.check_float("entropy", entropy)
    tokens = checks.token_layout("entropy", entropy, mask, cu_seqlens)
    checks.check_shape("rewards", rewards, (tokens.batch,), "one per row of entropy")
    checks.check_device("entropy", entropy, rewards.device, "rewards")
    ids = group_ids(groups, group_size, tokens.batch, rewards.device, "rewards")
    alpha1 = checks.check_finite("alpha1", alpha1)
    alpha2 = checks.check_finite("alpha2", alpha2)
    threshold = _threshold(positive)
    entropy_floor = checks.check_positive("entropy_floor", entropy_floor)
    checks.check_flag("entropy_grad", entropy_grad)
    rewards, entropy = checks.promote(rewards, entropy if entropy_grad else entropy.detach())
    out: Tensor = ops.gtpo_rewards(
        rewards,
        entropy,
        ids,
        tokens.mask,
        tokens.cu_seqlens,
        alpha1,
        alpha2,
        threshold,
        entropy_floor,
        groups is None,
    )
    return out


def _threshold(positive: float | Tensor | None) -> Number:
    return 0.0 if positive is None else checks.check_number("positive", positive)


# ---- rewards of rows, and class-wise normalisation -----------------------------------------------------------


def grpo_s_rewards(
    rewards: Tensor,
    entropy: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    beta1: float | Tensor = 1.0,
    beta2: float | Tensor = 0.1,
    positive: float | Tensor | None = None,
    entropy_floor: float | Tensor = 1e-2,
    entropy_grad: bool = False,
) -> Tensor:
    """Row rewards of GRPO-S: as :func:`gtpo_rewards`, from the rows' mean entropy (2508.04349, eq. 8 to 11).

    - right row i: ``beta1 * rewards[i] + beta2 * |P| * H[i] / sum over P of H[k]``
    - wrong row j: ``-beta1 - beta2 * |N| * (1 / H[j]) / sum over N of (1 / H[k])``

    with P and N the right and wrong rows of the group. Arguments as in :func:`gtpo_rewards`; a row without a valid
    token is in neither, and has 0.

    Args:
        rewards: ``[B]``, the outcome of each row; float32, bfloat16, float16 or float64.
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, in nats.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        mask: the shape of ``entropy``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        beta1: weight of the outcome.
        beta2: weight of the entropy's share.
        positive: rows with a reward above this are right, the others wrong; None for 0.
        entropy_floor: in wrong rows, mean entropies below it are raised to it; above 0, in nats.
        entropy_grad: let the gradient flow into ``entropy`` too.

    Returns:
        ``[B]``, float32 (float64 where an input is), rewards for :func:`rewardops.group_advantages`, which
        normalises right and wrong rows of a group together, as GRPO does. To normalise them apart, as GTPO's
        tokens are: ``signed_group_normalize(grpo_s_rewards(...)[:, None], rewards, groups)``. Differentiable in
        ``rewards`` (right rows), and in ``entropy`` with ``entropy_grad``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, a
            number out of its range.

    Example:
        >>> entropy = torch.tensor([[1.0, 1.0], [2.0, 4.0], [2.0, 2.0]])
        >>> shaped = ro.grpo_s_rewards(torch.tensor([1.0, 1.0, 0.0]), entropy, group_size=3)
        >>> [round(x, 2) for x in shaped.tolist()]  # the surer right row is paid less
        [1.05, 1.15, -1.1]
    """
    checks.check_rewards(rewards)
    tokens = TokenValues.of("entropy", entropy, mask, cu_seqlens, grad=True)
    checks.check_rows("rewards", rewards, tokens.rows.batch, entropy.device, "entropy")
    ids = group_ids(groups, group_size, tokens.rows.batch, entropy.device, "entropy")
    beta1 = checks.check_finite("beta1", beta1)
    beta2 = checks.check_finite("beta2", beta2)
    _threshold(positive)
    entropy_floor = checks.check_positive("entropy_floor", entropy_floor)
    checks.check_flag("entropy_grad", entropy_grad)
    counts = tokens.counts()
    return gtpo_rewards(
        rewards, tokens.means(tokens.values, counts)[:, None], ids, mask=(counts > 0)[:, None], alpha1=beta1,
        alpha2=beta2, positive=positive, entropy_floor=entropy_floor, entropy_grad=entropy_grad,
    )[:, 0]  # fmt: skip


def signed_group_normalize(
    values: Tensor,
    rewards: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    positive: float | Tensor | None = None,
    eps: float | Tensor = 1e-8,
    ddof: int = 0,
    eps_at: str = "variance",
    joint: bool = False,
) -> Tensor:
    """GTPO's advantages from its token rewards: z-scores over a group's tokens, of right and wrong rows apart.

    ``(value - mean) / sqrt(var + eps)`` with the population variance, over all valid tokens of the group's right
    rows, and of its wrong rows (2508.04349, eq. 6). Tokens of right rows then have mean 0: about half of a right
    response is pushed down, and equal entropies give 0. ``joint=True`` normalises over both at once, and keeps
    the sign of the outcome: with a mask of step ends, the z-scores of all steps of a group.

    Args:
        values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``, as from :func:`gtpo_rewards`; float32, bfloat16,
            float16 or float64.
        rewards: ``[B]``; rows with a reward above ``positive`` are right, the others wrong.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        mask: the shape of ``values``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        positive: the largest reward of a wrong row; None for 0.
        eps: at least 0, see ``eps_at``.
        ddof: 0 for the population's variance, 1 for the unbiased one, as of ``torch.std`` (IGPO, 2510.14967).
        eps_at: what ``eps`` is added to: ``"variance"``, inside the root, or ``"std"``: ``(value - mean) / (std
            + eps)``.
        joint: normalise right and wrong rows together.

    Returns:
        The layout of ``values``, float32 (float64 for float64), 0 where masked. Equal values, and a single one,
        give exactly 0. Differentiable in ``values``. A value that is not finite makes what it is normalised
        with NaN, in values and gradients.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, an
            unknown ``eps_at``, a number out of its range.

    Example:
        >>> values = torch.tensor([[1.0, 3.0], [-1.0, -3.0]])
        >>> rewards = torch.tensor([1.0, 0.0])
        >>> out = ro.signed_group_normalize(values, rewards, group_size=2)
        >>> [[round(x, 2) for x in row] for row in out.tolist()]
        [[-1.0, 1.0], [1.0, -1.0]]
    """
    checks.check_rewards(rewards)
    tokens = TokenValues.of("values", values, mask, cu_seqlens, grad=True)
    rows, x = tokens.rows, tokens.values
    checks.check_rows("rewards", rewards, rows.batch, values.device, "values")
    eps = checks.check_eps_ddof(eps, ddof)
    checks.check_choice("eps_at", eps_at, ("variance", "std"))
    checks.check_flag("joint", joint)
    threshold = _threshold(positive)
    ids = group_ids(groups, group_size, rows.batch, rewards.device, "rewards")
    outcomes = None if joint else rewards.detach()
    if outcomes is not None and outcomes.dtype is not x.dtype:  # compared in its own precision
        right = (outcomes > threshold).to(x.dtype)
        outcomes, threshold = torch.where(outcomes.isnan(), torch.nan, right), 0.5
    out: Tensor = scopes.standardized(
        x,
        None,
        rows.mask,
        rows.cu_seqlens,
        ids,
        outcomes,
        threshold,
        eps,
        ddof,
        eps_at == "variance",
        True,
        True,
    )[0]
    return out


def advantage_logprob_cov(
    advantages: Tensor, logprob: Tensor, mask: Tensor | None = None, *, cu_seqlens: Tensor | None = None
) -> Tensor:
    """``(A - mean A) * (logprob - mean logprob)`` with means over all valid tokens; 0 where masked, no gradient.

    Its mean is the covariance that drives the decrease of the entropy (2505.22617).

    Args:
        advantages: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        logprob: the same shape, in nats.
        mask: the same shape; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.

    Returns:
        The layout of ``advantages``, float32 (float64 for float64 advantages), 0 where masked. Not
        differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> ro.advantage_logprob_cov(torch.tensor([[1.0, -1.0]]), torch.tensor([[-1.0, -3.0]])).tolist()
        [[1.0, 1.0]]
    """
    tokens = TokenValues.of("advantages", advantages, mask, cu_seqlens)
    checks.check_like("logprob", logprob, advantages, "advantages")
    a, lp = tokens.values, logprob.detach().to(tokens.values.dtype)
    out: Tensor = scopes.covariance_terms(a, lp, tokens.rows.mask, tokens.rows.cu_seqlens)
    return out


# ---- on advantages and rewards -------------------------------------------------------------------------------


def entropy_bonus(
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    alpha: float | Tensor = 0.4,
    kappa: float | Tensor = 2.0,
) -> Tensor:
    """``A + min(alpha * H, |A| / kappa)``, no gradient through ``H`` (2506.14758).

    Added to the signed advantage, so negative ones shrink; with ``kappa`` above 1 no sign flips. alpha is 0.4 for
    GRPO and 0.1 for PPO in the paper.

    Args:
        advantages: any shape, padded or packed; float32, bfloat16, float16 or float64.
        entropy: the same shape, in nats.
        mask: the same shape; bool, integer or float 0/1. None for all tokens.
        alpha: factor of the entropy, at least 0.
        kappa: above 0: the bonus is at most ``|A| / kappa``.

    Returns:
        The shape of ``advantages``, float32 (float64 where an input is), 0 where masked. Differentiable in
        ``advantages``. NaN where the entropy is not finite.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, a number out of its range.

    Example:
        >>> ro.entropy_bonus(torch.tensor([2.0, -2.0, 2.0]), torch.tensor([1.0, 1.0, 9.0]), alpha=0.5).tolist()
        [2.5, -1.5, 3.0]
    """
    checks.check_float("advantages", advantages)
    checks.check_like("entropy", entropy, advantages, "advantages")
    kappa = checks.check_positive("kappa", kappa)
    alpha = checks.check_non_negative("alpha", alpha)
    valid = checks.as_mask(mask, advantages.shape, advantages.device, "advantages")
    a, h = checks.promote(advantages, entropy.detach())
    if not a.numel():
        return a
    tokens = [scopes.as_rows(t) for t in (a, h, valid)]
    return scopes.capped_bonus(*tokens, alpha, kappa).view(a.shape)


def unlikeliness_rewards(
    rewards: Tensor,
    sequence_logprob: Tensor,
    groups: Labels = None,
    *,
    group_size: GroupSize = None,
    beta: float | Tensor = 0.25,
) -> Tensor:
    """``r * (1 - beta * (n - rank) / n)``, rank 1 the likeliest row of its group (2506.02355).

    Right rows that are likely under the policy are paid less; rewards of 0 stay 0. Among equal log-probabilities
    the earlier row counts as the likelier (in the authors' code the later one: both are arbitrary). A NaN among
    them makes its group NaN.

    Args:
        rewards: ``[B]``; float32, bfloat16, float16 or float64.
        sequence_logprob: ``[B]``, in nats; the authors rank by the mean log-probability of a row's tokens.
        groups: ``[B]``: integer labels in any order, or an array or sequence of hashable ones, such as prompt
            ids. None with ``group_size``.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        beta: at least 0, the share that the likeliest row loses but for ``1 / n``.

    Returns:
        ``[B]``, float32 (float64 where an input is). Differentiable in ``rewards``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, neither or both of ``groups`` and ``group_size``, a
            ``beta`` below 0 or not finite.

    Example:
        >>> rewards, logprob = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([-1.0, -4.0, -2.0, -3.0])
        >>> ro.unlikeliness_rewards(rewards, logprob, group_size=4, beta=0.5).tolist()
        [0.625, 1.0, 0.0, 0.875]
    """
    checks.check_rewards(rewards)
    checks.check_like("sequence_logprob", sequence_logprob, rewards, "rewards")
    beta = checks.check_non_negative("beta", beta)
    ids = group_ids(groups, group_size, rewards.shape[0], rewards.device, "rewards")
    r, lp = checks.promote(rewards, sequence_logprob.detach())
    rank = _ranks(lp, ids, descending=True)
    place = scope_ids("group", ids, ids.shape[0], ids.device)
    n = scope_counts(torch.ones_like(place), place)[place]
    factor = 1 - beta * (n - rank).to(r.dtype) / n.to(r.dtype)
    unknown = scope_counts(lp.isnan(), place)[place] > 0
    return r * torch.where(unknown, torch.nan, factor)


def entropy_reward(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    cu_seqlens: Tensor | None = None,
    per: str = "row",
    reduce: str = "mean",
) -> Tensor:
    """Entropy minimisation as a reward: ``-H`` per token, or minus a row's entropy, ``[B]``.

    No gradient flows into ``entropy``: as a loss use the entropy itself.

    Args:
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64, in nats.
        mask: the shape of ``entropy``; bool, integer or float 0/1. None for all tokens.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        per: ``"row"`` or ``"token"``.
        reduce: what becomes of a row's tokens: ``"mean"`` (RENT, 2505.22660), or ``"sum"`` (the token-level
            EM-RL of 2505.15134), with which a long row costs more. Of no effect with ``per="token"``.

    Returns:
        ``[B]``, or the layout of ``entropy`` with ``per="token"``, 0 where masked; float32 (float64 for
        float64). Not differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown ``per`` or ``reduce``.

    Example:
        >>> entropy, mask = torch.tensor([[1.0, 2.0], [4.0, 9.0]]), torch.tensor([[1, 1], [1, 0]])
        >>> ro.entropy_reward(entropy, mask).tolist()
        [-1.5, -4.0]
    """
    checks.check_choice("per", per, ("row", "token"))
    checks.check_choice("reduce", reduce, ("mean", "sum"))
    tokens = TokenValues.of("entropy", entropy, mask, cu_seqlens)
    if per == "token":
        return -tokens.zeroed()
    sums = reduce == "sum"
    return -(row_sums(tokens.values, tokens.rows) if sums else tokens.means(tokens.values, tokens.counts()))


# ---- weights with mean 1 -------------------------------------------------------------------------------------

MODES = ("linear", "softmax", "rank", "quantile")


def entropy_weights(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    mode: str = "linear",
    normalize: str = "batch",
    groups: Labels = None,
    group_size: GroupSize = None,
    cu_seqlens: Tensor | None = None,
    inverse: bool = False,
    temperature: float | Tensor = 1.0,
    fraction: float | Tensor = 0.2,
    entropy_floor: float | Tensor = 1e-2,
    entropy_grad: bool = False,
) -> Tensor:
    """A weight for each token by its entropy, with mean 1 over the valid tokens, so that a loss keeps its scale.

    ``"linear"``: the entropy (inverse: one over it, floored first); ``"softmax"``: ``exp(H / temperature)``
    (inverse: ``exp(-H / temperature)``); ``"rank"``: the rank, 1 the lowest entropy (inverse: 1 the highest),
    equal entropies by position; ``"quantile"``: only the ``fraction`` of highest (inverse: lowest) entropy.
    Where all raw weights are 0 the weights are 1. An entropy that is not finite makes the weights of its scope NaN.

    Args:
        entropy: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64, in nats.
        mask: the shape of ``entropy``; bool, integer or float 0/1. None for all tokens.
        mode: ``"linear"``, ``"softmax"``, ``"rank"`` or ``"quantile"``.
        normalize: the scope over which the mean is 1: ``"batch"``, ``"row"`` or ``"group"`` (with ``groups`` or
            ``group_size``).
        groups: ``[B]``: labels of the rows' groups, as in :func:`gtpo_rewards`; for ``normalize="group"``
            alone.
        group_size: instead of ``groups``: the rows of each contiguous group, or a list or integer tensor of
            their sizes.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows, from 0 to N. None for padded rows.
        inverse: for wrong rows: more weight where the policy was sure.
        temperature: above 0, for ``"softmax"``, in nats.
        fraction: 0 to 1, for ``"quantile"``.
        entropy_floor: above 0, in nats: lower entropies are raised to it, for ``"linear"`` with ``inverse``.
        entropy_grad: let the gradient flow into the entropy (linear and softmax); off by default, as it is a
            hidden entropy term in a loss.

    Returns:
        The layout of ``entropy``, float32 (float64 for float64), 0 where masked. Differentiable in ``entropy``
        with ``entropy_grad``.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown ``mode`` or ``normalize``, groups that are
            missing or not asked for, a number out of its range.

    Example:
        >>> ro.entropy_weights(torch.tensor([[1.0, 2.0, 3.0]])).tolist()
        [[0.5, 1.0, 1.5]]
        >>> ro.entropy_weights(torch.tensor([[1.0, 2.0, 3.0]]), mode="quantile", fraction=0.3).tolist()
        [[0.0, 0.0, 3.0]]
    """
    checks.check_choice("mode", mode, MODES)
    temperature = checks.check_positive("temperature", temperature)
    entropy_floor = checks.check_positive("entropy_floor", entropy_floor)
    fraction = checks.check_fraction("fraction", fraction)
    checks.check_flag("inverse", inverse)
    checks.check_flag("entropy_grad", entropy_grad)
    tokens = TokenValues.of("entropy", entropy, mask, cu_seqlens, grad=entropy_grad)
    rows, h = tokens.rows, tokens.values
    ids = None  # of one scope
    if normalize != "batch" or groups is not None or group_size is not None:
        ids = scope_of_rows(normalize, groups, group_size, rows.batch, entropy.device, "normalize")
    rate: Number = 1.0
    form = "linear"
    if mode == "softmax":
        form, rate = "exponential", (-1 if inverse else 1) / temperature
    elif mode == "linear":
        form = "inverse" if inverse else "linear"
    else:
        score = -h.detach() if inverse else h.detach()
        if mode == "rank":
            place = scope_of_rows("batch", None, None, rows.batch, h.device) if ids is None else ids
            score = torch.where(tokens.valid(), score, torch.inf)
            raw = _ranks(score, rows.expand(place)).to(h.dtype)
        else:
            raw = largest(score, rows, ids, fraction).to(h.dtype)
        h = raw * defined(h)
    out: Tensor = scopes.scope_weights(h, rows.mask, rows.cu_seqlens, ids, form, rate, entropy_floor)[0]
    return out


def _ranks(x: Tensor, scopes: Tensor, descending: bool = False) -> Tensor:
    """Ranks within the scopes, 1 for the smallest (or largest) value; ties by position. By two stable sorts."""
    order = x.flatten().argsort(descending=descending, stable=True)
    place = scopes.flatten()
    order = order[place[order].argsort(stable=True)]
    # The start of each element's scope in that order.
    position = torch.arange(order.shape[0], dtype=torch.int64, device=order.device)
    sorted_place = place[order]
    start = torch.searchsorted(sorted_place, sorted_place)
    return torch.empty_like(order).index_copy_(0, order, position - start + 1).view(x.shape)


# ---- the entropy's change ------------------------------------------------------------------------------------


def entropy_change(
    advantages: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    sum_p2: Tensor,
    sum_p2_logp: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """First-order change of the entropy of a token's distribution by its own policy-gradient step, exact.

    ``A * (sum p^2 (log p + H) - p_a (log p_a + H))`` per unit of step: the step on the logits is
    ``A * (onehot(a) - p)``, and ``dH / dz = -p (log p + H)``. Its mean over the policy's own samples is the
    covariance of 2505.22617; :func:`steer_metric` leaves out the sum. No gradient.

    Args:
        advantages: any shape, padded or packed; float32, bfloat16, float16 or float64.
        logprob: the same shape, log-probability of the token, in nats, as :func:`rewardops.token_stats` returns
            it.
        entropy: the same shape, in nats.
        sum_p2: the same shape, the sum of squared probabilities.
        sum_p2_logp: the same shape, the sum of ``p^2 log p``.
        mask: the same shape; bool, integer or float 0/1. None for all tokens.

    Returns:
        The shape of ``advantages``, float32 (float64 where an input is), 0 where masked; positive where the
        entropy rises. Not differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> names = ["logprob", "entropy", "sum_p2", "sum_p2_logp"]
        >>> stats = ro.token_stats(torch.tensor([[2.0, 0.0]] * 2), torch.tensor([0, 1]), outputs=names)
        >>> change = ro.entropy_change(torch.ones(2), *(getattr(stats, name) for name in names))
        >>> [round(x, 3) for x in change.tolist()]  # more of the likelier token: less entropy
        [-0.05, 0.37]
    """
    checks.check_float("advantages", advantages)
    inputs = {"logprob": logprob, "entropy": entropy, "sum_p2": sum_p2, "sum_p2_logp": sum_p2_logp}
    for name, value in inputs.items():
        checks.check_like(name, value, advantages, "advantages")
    valid = checks.as_mask(mask, advantages.shape, advantages.device, "advantages")
    a, lp, h, q, s = checks.promote(*(t.detach() for t in (advantages, *inputs.values())))
    # p log p of a token of probability 0 is 0.
    of_token = torch.where(lp == -torch.inf, 0, lp.exp() * (lp + h))
    out = a * (s + h * q - of_token)
    return out if valid is None else torch.where(valid, out, 0)


def steer_metric(
    advantages: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    old_logprob: Tensor | None = None,
) -> Tensor:
    """STEER's estimate of how much a token's update changes the entropy, as published in its code.

    ``|(A / pi_old) * p * (1 - p) * (log p + H)|`` with p the token's probability (``pi_old`` is p without
    ``old_logprob``); 0 for a token of probability 0 that the old policy could draw. It is not the first-order
    change: that has a term of the whole distribution, which this estimate leaves out. No gradient.

    Args:
        advantages: any shape, padded or packed; float32, bfloat16, float16 or float64.
        logprob: the same shape, log-probability of the token, in nats.
        entropy: the same shape, in nats.
        mask: the same shape; bool, integer or float 0/1. None for all tokens.
        old_logprob: the same shape, of the policy that sampled; None where it is the policy.

    Returns:
        The shape of ``advantages``, float32 (float64 where an input is), at least 0; 0 where masked. Not
        differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match.

    Example:
        >>> logprob = torch.tensor([0.5, 0.25]).log()
        >>> metric = ro.steer_metric(torch.tensor([1.0, -1.0]), logprob, torch.tensor([1.0, 1.0]))
        >>> [round(x, 3) for x in metric.tolist()]
        [0.153, 0.29]
    """
    checks.check_float("advantages", advantages)
    inputs = [advantages, logprob, entropy] + ([] if old_logprob is None else [old_logprob])
    for name, value in zip(("logprob", "entropy", "old_logprob"), inputs[1:], strict=False):
        checks.check_like(name, value, advantages, "advantages")
    valid = checks.as_mask(mask, advantages.shape, advantages.device, "advantages")
    a, lp, h, *old = checks.promote(*(t.detach() for t in inputs))
    change = -torch.expm1(lp) * (lp + h)
    if old:
        ratio = (lp - old[0]).exp()
        change = torch.where(ratio == 0, 0, ratio * change)  # p log p of a token of probability 0 is 0
    out = (a * change).abs()
    return out if valid is None else torch.where(valid, out, 0)


def steer_weights(
    metric: Tensor,
    mask: Tensor | None = None,
    *,
    mode: str = "linear",
    low: float | Tensor = 0.8,
    high: float | Tensor = 1.2,
) -> Tensor:
    """Token weights of STEER from its metric: less weight for tokens that would move the entropy more.

    ``"linear"``: from ``high`` at the batch's smallest metric to ``low`` at its largest (equal metrics, such as the
    zeros of a batch without advantages, or a single one: ``(low + high) / 2``, as in the authors' code);
    ``"exp"``: ``exp(-k * metric)`` with ``k = -ln(low) / max(largest metric, 0.02)``, no less than ``low``.

    Args:
        metric: any shape, as from :func:`steer_metric`; float32, bfloat16, float16 or float64.
        mask: the same shape; bool, integer or float 0/1. None for all tokens.
        mode: ``"linear"`` or ``"exp"``.
        low: the smallest weight, above 0.
        high: the largest weight of ``"linear"``, at least ``low``.

    Returns:
        The shape of ``metric``, float32 (float64 for float64), 0 where masked. Not differentiable.

    Raises:
        TypeError: an argument of a type or dtype that is not accepted.
        ValueError: a shape or device that does not match, an unknown mode, a number out of its range.

    Example:
        >>> weights = ro.steer_weights(torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([1, 1, 1, 0]))
        >>> [round(x, 3) for x in weights.tolist()]
        [1.2, 1.0, 0.8, 0.0]
    """
    checks.check_float("metric", metric)
    checks.check_choice("mode", mode, ("linear", "exp"))
    low = checks.check_positive("low", low)
    high = checks.check_finite("high", high)
    if not (isinstance(low, Tensor) or isinstance(high, Tensor)) and high < low:
        raise ValueError(f"high: got {high}, want at least low ({low})")
    valid = checks.as_mask(mask, metric.shape, metric.device, "metric")
    (x,) = checks.promote(metric.detach())
    if not x.numel():
        return x
    form = "exponential" if mode == "exp" else "linear"
    return scopes.steered(scopes.as_rows(x), scopes.as_rows(valid), form, low, high).view(x.shape)
