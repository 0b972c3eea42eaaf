"""Discounted sums and temporal differences: reverse scans over the tokens of a row."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .core import checks, distributed, row_parts
from .core.checks import Number
from .core.precision import wide, widest
from .core.rows import Layout
from .core.scalars import smaller
from .core.settings import may_read
from .ops import td as ops
from .reference.td import TdArgs

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["GAE", "VTrace", "discounted_returns", "gae", "lambda_returns", "vtrace"]

MASKED = ("skip", "step")


class GAE(NamedTuple):
    """Advantages, and the targets of the values.

    Attributes:
        advantages: the layout of the rewards; float32 (float64 where an input is), 0 where masked.
        returns: ``advantages + values``, the same layout and dtype: the targets of the values.
    """

    advantages: Tensor
    returns: Tensor


class VTrace(NamedTuple):
    """The targets of the values, and the advantages of the policy gradient.

    Attributes:
        targets: the layout of the rewards; float32 (float64 where an input is), 0 where masked.
        advantages: the same layout and dtype.
    """

    targets: Tensor
    advantages: Tensor


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "skip",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Discounted returns, ``G[t] = r[t] + gamma * G[t + 1]`` along every row.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        gamma: discount from 0 to 1: a number, or a tensor with one value, one per row ``[B]`` or one per
            token (where both fit: per row). No gradient flows into it.
        bootstrap: ``[B]``, the return after the last token of a row that was cut off; None for 0.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens may lie between valid ones.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        masked: masked tokens inside a row: ``"skip"`` leaves them out, ``"step"`` counts them as steps of
            reward 0.
        process_group: for sequence parallelism (context parallelism with consecutive parts): each rank holds
            the next part of every row, of any length, 0 included; the first rank holds the first part.
            ``mask``, ``cu_seqlens`` and factors per token are those of the part; ``bootstrap``, after the
            whole row, and factors per row are the same on every rank. One collective, of a few numbers per
            row, and one or two further scans. Not with ``masked="step"``. None for whole rows.

    Returns:
        The layout of ``rewards``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards`` and ``bootstrap``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a process group of another
            type.
        ValueError: a shape or device that does not match, a discount out of its range, an unknown ``masked``,
            ``masked="step"`` with a discount per token or a process group.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0, 1.0]])
        >>> ro.discounted_returns(rewards, gamma=0.5).tolist()
        [[0.25, 0.5, 1.0]]
        >>> mask = torch.tensor([[True, False, True]])  # the masked token is not a step
        >>> ro.discounted_returns(rewards, gamma=0.5, mask=mask).tolist()
        [[0.5, 0.0, 1.0]]
    """
    beyond = _beyond(process_group, rewards, None, bootstrap, gamma, 1.0, mask, cu_seqlens, masked)
    _, (out, _) = scan(rewards, None, beyond, gamma, 1.0, mask, cu_seqlens, masked)
    return out  # type: ignore[no-any-return]


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "skip",
    process_group: ProcessGroup | None = None,
) -> GAE:
    """Generalised advantage estimation (arXiv 1506.02438), not whitened.

    ``A[t] = delta[t] + gamma * lam * A[t + 1]`` with ``delta[t] = r[t] + gamma * V[t + 1] - V[t]``, and
    ``returns = A + V``. With ``masked="skip"`` masked tokens inside a row are skipped: the next token is the
    next valid one (verl, NeMo-RL, AReaL). With ``masked="step"`` they are steps of reward and value 0
    (OpenRLHF, slime). Masked tokens after a row's last valid token are not part of the row.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        values: the shape of ``rewards``, the value before each token; float32, bfloat16, float16 or float64.
        gamma: discount from 0 to 1: a number, or a tensor with one value, one per row ``[B]`` or one per
            token (where both fit: per row). No gradient flows into it.
        lam: as ``gamma``, but of at least 0: above 1 it is a weight, such as an importance ratio (as in
            rlax).
        bootstrap: ``[B]``, the value after the last token of a row that was cut off; None for 0.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens may lie between valid ones.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        masked: ``"skip"`` or ``"step"``, what masked tokens inside a row are.
        process_group: for sequence parallelism: each rank holds the next part of every row, see
            :func:`discounted_returns`. Not with ``masked="step"``. None for whole rows.

    Returns:
        :class:`GAE`, the layout of ``rewards``; float32 (float64 where an input is), 0 where masked. Sums are
        taken in float64. Differentiable in ``rewards``, ``values`` and ``bootstrap``. A factor of 0 cuts a
        row: tokens beyond it have no effect, even if they are infinite.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a process group of another
            type.
        ValueError: a shape or device that does not match, a number out of its range, an unknown ``masked``,
            ``masked="step"`` with factors per token or a process group.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0, 1.0]])
        >>> values = torch.tensor([[0.5, 0.5, 0.75]])
        >>> out = ro.gae(rewards, values, lam=0.5)
        >>> out.advantages.tolist()
        [[0.1875, 0.375, 0.25]]
        >>> out.returns.tolist()
        [[0.6875, 0.875, 1.0]]
    """
    checks.check_tensor("values", values)
    beyond = _beyond(process_group, rewards, values, bootstrap, gamma, lam, mask, cu_seqlens, masked)
    _, scanned = scan(rewards, values, beyond, gamma, lam, mask, cu_seqlens, masked)
    return GAE(*scanned)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    masked: str = "skip",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """TD(lambda) returns, the ``returns`` of :func:`gae`.

    ``G[t] = r[t] + gamma * ((1 - lam) * V[t + 1] + lam * G[t + 1])``.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        values: the shape of ``rewards``, the value before each token; float32, bfloat16, float16 or float64.
        gamma: discount from 0 to 1: a number, or a tensor with one value, one per row ``[B]`` or one per
            token (where both fit: per row). No gradient flows into it.
        lam: as ``gamma``, but of at least 0: 0 bootstraps at every token, 1 only at the end.
        bootstrap: ``[B]``, the value after the last token of a row that was cut off; None for 0.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
            Masked tokens may lie between valid ones.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.
        masked: masked tokens inside a row: ``"skip"`` leaves them out, ``"step"`` counts them as steps of
            reward and value 0.
        process_group: for sequence parallelism: each rank holds the next part of every row, see
            :func:`discounted_returns`. Not with ``masked="step"``. None for whole rows.

    Returns:
        The layout of ``rewards``; float32 (float64 where an input is), 0 where masked. Differentiable in
        ``rewards``, ``values`` and ``bootstrap``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted, a process group of another
            type.
        ValueError: a shape or device that does not match, a number out of its range, an unknown ``masked``,
            ``masked="step"`` with factors per token or a process group.

    Example:
        >>> rewards = torch.tensor([[0.0, 0.0, 1.0]])
        >>> values = torch.tensor([[0.5, 0.5, 0.75]])
        >>> [ro.lambda_returns(rewards, values, lam=lam).tolist() for lam in (0, 0.5, 1)]
        [[[0.5, 0.75, 1.0]], [[0.6875, 0.875, 1.0]], [[1.0, 1.0, 1.0]]]
    """
    out = gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        bootstrap=bootstrap,
        mask=mask,
        cu_seqlens=cu_seqlens,
        masked=masked,
        process_group=process_group,
    )
    return out.returns


def vtrace(
    rewards: Tensor,
    values: Tensor,
    log_ratio: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    rho_clip: float | None = 1.0,
    trace_clip: float | None = 1.0,
    advantage_rho_clip: float | None = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> VTrace:
    """V-trace (arXiv 1802.01561): off-policy targets, and the advantages that go with them.

    With ``ratio = exp(log_ratio)``, ``rho = min(rho_clip, ratio)`` and ``c = min(trace_clip, ratio)``:
    ``target[t] - V[t] = rho[t] (r[t] + gamma V[t+1] - V[t]) + gamma lam c[t] (target[t+1] - V[t+1])``, and
    ``advantage[t] = min(advantage_rho_clip, ratio) (r[t] + gamma (lam target[t+1] + (1 - lam) V[t+1]) -
    V[t])``, as in rlax. Masked tokens inside a row are skipped.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        values: the shape of ``rewards``, the value before each token; float32, bfloat16, float16 or float64.
        log_ratio: the shape of ``rewards``, in nats: logprob under the policy less that under the behaviour
            policy. No gradient flows into it.
        gamma: discount from 0 to 1: a number, or a tensor with one value, one per row ``[B]`` or one per
            token (where both fit: per row). No gradient flows into it.
        lam: as ``gamma``, but of at least 0.
        rho_clip: upper bound of the ratio in a temporal difference, at least 0; None for no bound.
        trace_clip: upper bound of the ratio in the trace, at least 0; None for no bound.
        advantage_rho_clip: upper bound of the ratio in an advantage, at least 0; None for no bound.
        bootstrap: ``[B]``, the value after the last token of a row that was cut off; None for 0.
        mask: the shape of ``rewards``; bool, or integer or float of 0 and 1; None: every token is valid.
        cu_seqlens: ``[B + 1]``, int32 or int64: offsets of packed rows; None for padded rows.

    Returns:
        :class:`VTrace`, the layout of ``rewards``; float32 (float64 where an input is), 0 where masked.
        Differentiable in ``rewards``, ``values`` and ``bootstrap``.

    Raises:
        TypeError: an argument that is no tensor, a dtype that is not accepted.
        ValueError: a shape or device that does not match, a number out of its range.

    Example:
        >>> rewards, values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 0.5]])
        >>> half = torch.tensor([[0.5, 0.5]]).log()  # half as likely under the policy
        >>> out = ro.vtrace(rewards, values, half)
        >>> [round(x, 3) for x in out.targets[0].tolist()]
        [0.625, 0.75]
        >>> [round(x, 3) for x in out.advantages[0].tolist()]
        [0.125, 0.25]
    """
    checks.check_float("rewards", rewards)
    checks.check_like("log_ratio", log_ratio, rewards, "rewards")
    checks.check_like("values", values, rewards, "rewards")
    ratio = checks.promote(log_ratio.detach())[0].exp()
    bounds = []
    clips = {"rho_clip": rho_clip, "trace_clip": trace_clip, "advantage_rho_clip": advantage_rho_clip}
    for name, clip in clips.items():
        bounds.append(ratio if clip is None else smaller(ratio, checks.check_non_negative(name, clip)))
    rho, trace, advantage_rho = bounds
    options = (gamma, lam, mask, cu_seqlens, "skip")
    rows, (excess, targets) = scan(rewards, values, bootstrap, *options, rho, trace)
    scale = lam
    if isinstance(lam, Tensor) and lam.dim():
        scale = lam.detach().to(excess.dtype)
        scale = rows.expand(scale) if tuple(lam.shape) == (rows.batch,) else scale
    carried = excess * scale
    ahead = values.to(excess.dtype) + carried
    # r + gamma ahead[t+] - V is the difference in `ahead` plus `carried`.
    _, (change, _) = scan(rewards, ahead, bootstrap, gamma, 0.0, *options[2:])
    advantages = advantage_rho * (change + carried)
    if rows.mask is not None:
        advantages = torch.where(rows.mask, advantages, 0)
    return VTrace(targets, advantages)


# ---- arguments ---------------------------------------------------------------------------------------------


def factor(
    name: str,
    value: float | Tensor,
    rows: Layout,
    device: torch.device,
    other: str,
    masked: str = "skip",
    most: float = 1.0,
) -> tuple[Number, Tensor | None]:
    """Validate a discount from 0 to ``most``, 1 or infinity.

    A number gives ``(value, None)``, a tensor ``(1.0, tensor)``.

    The tensor is per row, ``[B, 1]``, or per token of ``other``.
    """
    if type(value) is float and 0 <= value <= most and value < math.inf:
        return value, None
    limits = "from 0 to 1" if most == 1 else "of at least 0"
    if not isinstance(value, Tensor) or value.dim() == 0:
        number = checks.check_number(name, value, f"a number {limits}, or a tensor")
        if not (isinstance(number, Tensor) or (0 <= number <= most and number < math.inf)):
            raise ValueError(f"{name}: got {value!r}, want a number {limits}, or a tensor")
        return number, None
    if value.dtype not in (*checks.FLOATS, *checks.INTEGERS, torch.bool):
        raise TypeError(f"{name}: got dtype {value.dtype}, want float, integer or bool")
    checks.check_device(name, value, device, other)
    if tuple(value.shape) == (rows.batch,):
        factors = value.detach()[:, None]
    elif tuple(value.shape) == rows.shape:
        if masked == "step":
            raise ValueError(
                f"{name}: got a value per token with masked='step', want one per row, or masked='skip'"
            )
        factors = value.detach()
    else:
        want = f"[{rows.batch}] or {checks.show(rows.shape)} (one per row or per token of {other})"
        raise ValueError(f"{name}: got shape {checks.show(value.shape)}, want {want}")
    if may_read(factors):
        per_row = tuple(value.shape) == (rows.batch,)
        read = factors if rows.mask is None or per_row else factors[rows.mask]
        if not bool(((read >= 0) & (read <= most) & (read < math.inf)).all()):
            raise ValueError(f"{name}: got a value that is not {limits}")
    return 1.0, wide(factors)


def scan(
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
    rho: Tensor | None = None,
    trace: Tensor | None = None,
    names: tuple[str, str] = ("rewards", "values"),
) -> tuple[Layout, tuple[Tensor, Tensor]]:
    """The layout, and the pair of advantages and returns; ``names`` are those of rewards and values in errors."""
    name, values_name = names
    checks.check_float(name, rewards)
    checks.check_choice("masked", masked, MASKED)
    rows = checks.token_layout(name, rewards, mask, cu_seqlens)
    checks.check_values(name, rewards, rows.mask)
    if values is not None:
        checks.check_like(values_name, values, rewards, name)
        checks.check_values(values_name, values, rows.mask)
    gamma_value, gammas = factor("gamma", gamma, rows, rewards.device, name, masked)
    lam_value, lambdas = factor("lam", lam, rows, rewards.device, name, masked, math.inf)
    if bootstrap is not None:
        checks.check_rows("bootstrap", bootstrap, rows.batch, rewards.device, name)
        if values is None:
            values = torch.zeros_like(rewards)
    tensors = (rewards, values, bootstrap, rho, trace)
    promoted = iter(checks.promote(*[t for t in tensors if t is not None]))
    args = TdArgs(  # type: ignore[call-arg]
        *[None if t is None else next(promoted) for t in tensors],  # type: ignore[arg-type]
        gammas, lambdas, rows.mask, rows.cu_seqlens, gamma_value, lam_value, masked == "step",
    )  # fmt: skip
    return rows, ops.td_scan(*args)


def _beyond(
    process_group: ProcessGroup | None,
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    masked: str,
) -> Tensor | None:
    """Bootstrap value of every row; with a process group, of this rank's part of the row."""
    if process_group is None:
        return bootstrap
    distributed.check(process_group)
    checks.check_choice("masked", masked, MASKED)
    if masked != "skip":
        raise ValueError(f"masked: got {masked!r} with process_group, want 'skip'")
    checks.check_float("rewards", rewards)
    rows = checks.token_layout("rewards", rewards, mask, cu_seqlens)
    if bootstrap is not None:
        checks.check_rows("bootstrap", bootstrap, rows.batch, rewards.device, "rewards")
    after = rewards.new_zeros(rows.batch) if bootstrap is None else bootstrap
    part = _part(rewards, values, after, gamma, lam, mask, cu_seqlens, rows)
    out = row_parts.value_beyond(process_group, part, after)
    return out.to(checks.promote(*(t for t in (rewards, values, bootstrap) if t is not None))[0].dtype)


def _part(
    rewards: Tensor,
    values: Tensor | None,
    after: Tensor,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    rows: Layout,
) -> row_parts.ScanPart:
    """Summary of this rank's part of every row; ``after`` has the shape and dtype of the value after it."""
    device, options = rewards.device, (gamma, lam, mask, cu_seqlens, "skip")
    zeros = torch.zeros_like(rewards)
    # These scans check the remaining arguments, before any kernel.
    advantages = scan(rewards, values, torch.zeros_like(after), *options)[1][0]
    growth = scan(zeros, None, torch.ones_like(after), *options)[1][0]
    first = ops.first_tokens(rows, device)
    if isinstance(lam, Tensor) and tuple(lam.shape) not in ((), (rows.batch,)):
        trace = ops.at_marked(wide(lam), ops.last_tokens(rows, device), rows)
    else:
        trace = torch.as_tensor(lam, dtype=widest(device), device=device).expand(rows.batch)
    at_first = (first, advantages, growth, zeros if values is None else values)
    live, advantage, grows, value = (ops.at_marked(wide(x), first, rows) for x in at_first)
    return row_parts.ScanPart(live, advantage, grows, value, trace)
