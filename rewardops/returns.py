"""Returns: what is still to come, as reverse scans over the tokens or the steps of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .core import checks, distributed
from .core.dispatch import define
from .core.rows import Layout, batch_of
from .core.settings import may_read

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# ---- the ops -----------------------------------------------------------------------------------------------


def _setup_extremes(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rewards, *tensors, ctx.largest = inputs
    ctx.save_for_backward(rewards, output, *tensors)


def _gradient_extremes(ctx, grad):  # type: ignore[no-untyped-def]
    return _extremes_backward(grad, *ctx.saved_tensors, ctx.largest), None, None, None, None


_extremes_backward = define(
    "returns",
    "extreme_returns_backward(Tensor grad, Tensor rewards, Tensor returns, Tensor? mask, Tensor? cu_seqlens,"
    " Tensor? steps, bool largest) -> Tensor",
    fake=lambda grad, rewards, *_: rewards.new_empty(rewards.shape),
)

_extremes = define(
    "returns",
    "extreme_returns(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps, bool largest) -> Tensor",
    fake=lambda rewards, *_: rewards.new_empty(rewards.shape),
    setup_context=_setup_extremes,
    backward=_gradient_extremes,
)


def _setup_softmin(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, temperature, through_weights = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (temperature, through_weights)


def _gradient_softmin(ctx, grad):  # type: ignore[no-untyped-def]
    return (_softmin_backward(grad, *ctx.saved_tensors, *ctx.options), *[None] * 5)


_softmin_backward = define(
    "returns",
    "softmin_rewards_backward(Tensor grad, Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps,"
    " float temperature, bool through_weights) -> Tensor",
    fake=lambda grad, rewards, *_: rewards.new_empty(rewards.shape),
)

_softmin_forward = define(
    "returns",
    "softmin_rewards(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps, float temperature,"
    " bool through_weights) -> Tensor",
    fake=lambda rewards, *_: rewards.new_empty(rewards.shape),
    setup_context=_setup_softmin,
    backward=_gradient_softmin,
)


def _setup_soft_returns(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rewards, mask, cu_seqlens, steps, temperature, _ = inputs
    _, log_sums = output
    ctx.mark_non_differentiable(log_sums)
    ctx.save_for_backward(rewards, log_sums, mask, cu_seqlens, steps)
    ctx.temperature = temperature


def _gradient_soft_returns(ctx, grad, _):  # type: ignore[no-untyped-def]
    return (_soft_returns_backward(grad, *ctx.saved_tensors, ctx.temperature), *[None] * 5)


_soft_returns_backward = define(
    "returns",
    "softmin_returns_backward(Tensor grad, Tensor rewards, Tensor log_sums, Tensor? mask, Tensor? cu_seqlens,"
    " Tensor? steps, float temperature) -> Tensor",
    fake=lambda grad, rewards, *_: rewards.new_empty(rewards.shape),
)

_soft_returns = define(
    "returns",
    "softmin_returns(Tensor rewards, Tensor? mask, Tensor? cu_seqlens, Tensor? steps, float temperature,"
    " bool mean) -> (Tensor returns, Tensor log_sums)",
    fake=lambda rewards, *_: (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(rewards.shape, dtype=torch.float64),
    ),
    setup_context=_setup_soft_returns,
    backward=_gradient_soft_returns,
)

_TD = "Tensor? rho, Tensor? trace, Tensor? gammas, Tensor? lambdas, Tensor? mask, Tensor? cu_seqlens"
_TD_OPTIONS = "float gamma, float lam, bool decay"


def _setup_td(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    rewards, values, bootstrap, *tensors = inputs[:9]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(rewards, *tensors)
    ctx.given = values is not None, bootstrap is not None
    ctx.options = inputs[9:]


def _gradient_td(ctx, grad, grad_returns):  # type: ignore[no-untyped-def]
    has_values, has_bootstrap = ctx.given
    grad_returns = grad_returns if has_values else None  # of an empty tensor
    if grad is None and grad_returns is None:
        return (None,) * 12
    rewards, *tensors = ctx.saved_tensors
    found = _td_backward(grad, grad_returns, rewards, *tensors, *ctx.options, *ctx.given)
    on_values, on_bootstrap = found[1] if has_values else None, found[2] if has_bootstrap else None
    return (found[0], on_values, on_bootstrap, *[None] * 9)


def _fake_td_backward(grad, grad_returns, rewards, *rest):  # type: ignore[no-untyped-def]
    cu_seqlens, has_values, has_bootstrap = rest[5], *rest[-2:]
    batch = batch_of(rewards.shape, cu_seqlens)
    return (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(rewards.shape if has_values else 0),
        rewards.new_empty(batch if has_bootstrap else 0),
    )


_td_backward = define(
    "returns",
    f"td_scan_backward(Tensor? grad, Tensor? grad_returns, Tensor rewards, {_TD}, {_TD_OPTIONS},"
    " bool has_values, bool has_bootstrap) -> (Tensor, Tensor, Tensor)",
    fake=_fake_td_backward,
)

_td = define(
    "returns",
    f"td_scan(Tensor rewards, Tensor? values, Tensor? bootstrap, {_TD}, {_TD_OPTIONS})"
    " -> (Tensor advantages, Tensor returns)",
    fake=lambda rewards, values, *_: (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(0 if values is None else rewards.shape),
    ),
    setup_context=_setup_td,
    backward=_gradient_td,
)


_prefix_scan = define(
    "returns",
    "prefix_scan(Tensor x, Tensor factors, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    backward=lambda ctx, grad: (
        _td(grad, *[None] * 4, ctx.saved_tensors[0], None, *ctx.saved_tensors[1:], 1.0, 1.0, False)[0],
        *[None] * 3,
    ),
)


def prefix_scan(x: Tensor, factors: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``u[t] = x[t] + factors[t-] u[t-]`` with ``t-`` the valid token before; factors float64, as ``x``."""
    out: Tensor = _prefix_scan(x, factors, mask, cu_seqlens)
    return out


_differences = define(
    "returns",
    "differences(Tensor x, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    backward=lambda ctx, grad: (
        -_td(torch.zeros_like(grad), grad, *[None] * 5, *ctx.saved_tensors, 1.0, 0.0, False)[0],
        None,
        None,
    ),
)


def differences(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``x[t] - x[t-]`` with ``t-`` the valid token before, and 0 before the first of a row."""
    out: Tensor = _differences(x, mask, cu_seqlens)
    return out


def step_ends(markers: Tensor, rows: Layout) -> Tensor:
    """Which tokens end a step, from :func:`rewardops.layout.step_markers`: bool, the layout of the markers.

    Of ids, the last valid token before another id; negative ids are of no step.
    """
    if markers.dtype is torch.bool:
        return markers if rows.mask is None else markers & rows.mask
    # The distance to the next valid token's id; beyond a row that is -1.
    ids = markers.to(torch.float64)
    beyond = ids.new_full((rows.batch,), -1.0)
    where = (rows.mask, rows.cu_seqlens, 1.0, 0.0, False)
    apart, _ = _td(torch.zeros_like(ids), ids, beyond, *[None] * 4, *where)
    return (markers >= 0) & (apart != 0)


def last_tokens(rows: Layout, device: torch.device) -> Tensor:
    """The last valid token of every row: bool, per token."""
    return step_ends(torch.zeros(rows.shape, dtype=torch.int64, device=device), rows)


def sums_between(x: Tensor, ends: Tensor, rows: Layout) -> Tensor:
    """At each of the ends the sum of valid tokens since the one before, its own included; 0 elsewhere."""
    sums = prefix_scan(x, torch.where(ends, 0.0, 1.0).to(torch.float64), rows.mask, rows.cu_seqlens)
    return torch.where(ends, sums, 0)


# ---- rows in parts, on the ranks of a process group ----------------------------------------------------------


def first_tokens(rows: Layout, device: torch.device) -> Tensor:
    """The first valid token of every row: bool, per token."""
    ones = torch.ones(rows.shape, dtype=torch.float64, device=device)
    count = prefix_scan(ones, ones, rows.mask, rows.cu_seqlens)
    return (count == 1) & rows.valid(device)


def _at_row_ends(x: Tensor, ends: Tensor, rows: Layout) -> Tensor:
    """``[B]``, what the one token of each row that is marked has; 0 where there is none."""
    from . import segments  # which is built on this one

    return segments.row_sums(torch.where(ends, x, 0), rows)


def _later(process_group: ProcessGroup, record: Tensor) -> list[Tensor]:
    """The records ``[B, k]`` of the ranks after this one, the last one's first; zeros for the others.

    Those are there so that every rank has a share in the backward pass, a collective as well.
    """
    ranks, at = distributed.size(process_group), distributed.rank(process_group)
    gathered = distributed.gather([record], process_group, record.shape[0])
    everyone = gathered.tensors[0].view(ranks, *record.shape)
    later = torch.arange(ranks, device=record.device) > at
    return list(torch.where(later[:, None, None], everyone, 0).flip(0).unbind(0))


def _times(factor: Tensor, x: Tensor) -> Tensor:
    """The product; 0 where the factor is, whatever it meets."""
    return torch.where(factor == 0, 0, factor * torch.where(factor == 0, 0, x))


def _value_beyond(
    process_group: ProcessGroup,
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """``[B]``, the value after a part of a row that makes its scan that of the whole row.

    With the next valid token's value V and advantage A, on a later rank, that is ``V + lam A``: a scan is linear in
    it. What a part's first advantage is when that is 0, and how much it grows with it, is what ranks exchange.
    """
    checks.check_float("rewards", rewards)
    rows = checks.token_layout("rewards", rewards, mask, cu_seqlens)
    device, where = rewards.device, (mask, cu_seqlens, "hold")
    if bootstrap is not None:
        checks.check_rows("bootstrap", bootstrap, rows.batch, device, "rewards")
    nothing = torch.zeros_like(rewards)
    ends = rewards.new_zeros(rows.batch) if bootstrap is None else bootstrap
    # What is checked of the others is checked in here, before any kernel.
    alone = scan(rewards, values, torch.zeros_like(ends), gamma, lam, *where)[1][0]
    growth = scan(nothing, None, torch.ones_like(ends), gamma, lam, *where)[1][0]
    first = first_tokens(rows, device)
    per_token = isinstance(lam, Tensor) and tuple(lam.shape) != (rows.batch,)
    if per_token:
        trace = _at_row_ends(lam.double(), last_tokens(rows, device), rows)  # type: ignore[union-attr]
    else:
        trace = torch.as_tensor(lam, dtype=torch.float64, device=device).expand(rows.batch)
    of_value = nothing if values is None else values
    record = torch.stack(
        [
            _at_row_ends(first.double(), first, rows),
            *(_at_row_ends(x.double(), first, rows) for x in (alone, growth, of_value)),
            trace,
        ],
        1,
    )
    value, advantage = ends.double(), torch.zeros_like(ends, dtype=torch.float64)
    for part in _later(process_group, record):
        some, own, grows, starts, fades = part.unbind(1)
        carried = own + _times(grows, value + _times(fades, advantage))
        advantage = torch.where(some > 0, carried, advantage)
        value = torch.where(some > 0, starts, value)
    return value + _times(trace, advantage)


def _with_later_steps(
    process_group: ProcessGroup,
    found: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    join: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """Returns of parts of rows joined with those of later ranks' steps; and the number of steps left, float64."""
    rows = checks.token_layout("rewards", found, mask, cu_seqlens)
    device = found.device
    valid = rows.valid(device)
    ends = valid if steps is None else steps & valid
    number = discounted_returns(ends.double(), mask=mask, cu_seqlens=cu_seqlens)
    first = first_tokens(rows, device)
    record = torch.stack([_at_row_ends(number, first, rows), _at_row_ends(found.double(), first, rows)], 1)
    count, beyond = record.new_zeros(rows.batch), record.new_zeros(rows.batch)
    for part in _later(process_group, record):
        some, own = part.unbind(1)
        joined = torch.where(count > 0, join(own, beyond), own)
        beyond = torch.where(some > 0, joined, beyond)
        count = count + some
    later, after = rows.expand(count), rows.expand(beyond).to(found.dtype)
    out = torch.where(number > 0, torch.where(later > 0, join(found, after), found), after)
    return torch.where(valid, out, 0), torch.where(valid, number + later, 0)


# ---- over steps --------------------------------------------------------------------------------------------


def _prepare(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    checks.check_float("rewards", rewards)
    tokens = checks.token_layout("rewards", rewards, mask, cu_seqlens)
    markers = checks.step_markers(steps, rewards, tokens, "rewards")
    if process_group is not None:
        distributed.check(process_group)
        if markers is not None and markers.dtype is not torch.bool:
            raise TypeError(f"steps: got dtype {markers.dtype} with process_group, want bool (step ends)")
    checks.check_values("rewards", rewards, tokens.mask)
    (rewards,) = checks.promote(rewards)
    return rewards, tokens.mask, tokens.cu_seqlens, markers


def min_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """Min-form return: the smallest step reward still to come, ``G_k = min(r_k, G_{k+1})``.

    The credit assignment of PURE (arXiv 2504.15275, section 4), exact. Every valid token carries the return
    of the step it is in; where no step is left (the tokens after the last step end) it is 0. Rewards at
    positions that end no step are not read, so they never act as a reward of 0 (a zero-filled minimum, as in
    one published version, loses every positive reward).

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``rewards``; bool, integer or float 0/1. Masked tokens are passed over.
        cu_seqlens: ``[B + 1]`` for packed rows.
        steps: the shape of ``rewards``. bool: the tokens that end a step and hold its reward. Integer:
            step ids, non-decreasing along a row, negative for none; a step's reward is that at its last
            valid token. None: every valid token is a step.
        process_group: of sequence parallelism: each of its ranks has the next part of every row, see
            :func:`discounted_returns`. Steps are not ids then, whose last may go on on another rank.

    Returns:
        The layout of ``rewards``; float32 (float64 for float64), 0 where masked. Differentiable in
        ``rewards``: the gradient goes to the arg-min, of equal rewards to the earliest. A NaN reward makes
        its step's and every earlier return NaN.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match.
    """
    return _extreme_returns(rewards, mask, cu_seqlens, steps, process_group, False)


def max_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The largest step reward still to come; everything else as in :func:`min_returns`."""
    return _extreme_returns(rewards, mask, cu_seqlens, steps, process_group, True)


def _extreme_returns(
    rewards: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    steps: Tensor | None,
    process_group: ProcessGroup | None,
    largest: bool,
) -> Tensor:
    tensors = _prepare(rewards, mask, cu_seqlens, steps, process_group)
    out: Tensor = _extremes(*tensors, largest)
    if process_group is None:
        return out

    def earliest(own: Tensor, later: Tensor) -> Tensor:
        further = later > own if largest else later < own
        return torch.where(later.isnan() | further, later, own)

    return _with_later_steps(process_group, out, *tensors[1:], earliest)[0]


def softmin_returns(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    temperature: float = 0.1,
    mean: bool = False,
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """The soft minimum of the step rewards still to come, ``G_k = -T log sum_{j >= k} exp(-r_j / T)``.

    It tends to :func:`min_returns` as the temperature falls. ``mean=True`` divides the sum by the number of steps
    that are left, so that equal rewards have their own value as the return.

    Args:
        rewards, mask, cu_seqlens, steps, process_group: as in :func:`min_returns`. temperature: above 0.

    Returns:
        The layout of ``rewards``; float32 (float64 for float64); 0 where masked, and where no step is left.
        Differentiable in ``rewards``, by the weights ``softmax(-r / T)`` over the steps that are left.
    """
    checks.check_positive("temperature", temperature)
    checks.check_flag("mean", mean)
    tensors = _prepare(rewards, mask, cu_seqlens, steps, process_group)
    if process_group is None:
        out: Tensor = _soft_returns(*tensors, float(temperature), mean)[0]
        return out
    alone = _soft_returns(*tensors, float(temperature), False)[0]

    def softer(own: Tensor, later: Tensor) -> Tensor:
        return -temperature * torch.logaddexp(-own / temperature, -later / temperature)

    found, number = _with_later_steps(process_group, alone, *tensors[1:], softer)
    if not mean:
        return found
    return torch.where(number > 0, found + temperature * number.clamp(min=1).log(), 0).to(found.dtype)


def softmin_rewards(
    rewards: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    steps: Tensor | None = None,
    temperature: float = 0.1,
    through_weights: bool = True,
) -> Tensor:
    """PURE's transform of step rewards: ``r*_k = w_k r_k`` with ``w = softmax(-r / temperature)``.

    The softmax runs over the steps of a row. The plain sum of ``r*`` over a row tends to its smallest step
    reward as the temperature goes to 0 (arXiv 2504.15275, section 4; the authors train with 0.1).

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        mask: the shape of ``rewards``; bool, integer or float 0/1. Masked tokens are passed over.
        cu_seqlens: ``[B + 1]`` for packed rows.
        steps: as in :func:`min_returns`.
        temperature: above 0.
        through_weights: whether the gradient flows through ``w`` as well.

    Returns:
        The layout of ``rewards``: ``r*`` at step ends and 0 elsewhere; float32 (float64 for float64).
        Differentiable in ``rewards``.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, a
            temperature that is not above 0.
    """
    checks.check_positive("temperature", temperature)
    checks.check_flag("through_weights", through_weights)
    arguments = _prepare(rewards, mask, cu_seqlens, steps)
    out: Tensor = _softmin_forward(*arguments, float(temperature), through_weights)
    return out


# ---- over tokens -------------------------------------------------------------------------------------------

HOLES = ("hold", "decay")


class GAE(NamedTuple):
    """Advantages, and ``advantages + values``: the targets of the values."""

    advantages: Tensor
    returns: Tensor


class VTrace(NamedTuple):
    """The targets of the values, and the advantages of the policy gradient."""

    targets: Tensor
    advantages: Tensor


def factor(
    name: str,
    value: float | Tensor,
    rows: Layout,
    device: torch.device,
    other: str,
    hole: str = "hold",
) -> tuple[float, Tensor | None]:
    """A number for all, or float64 per row ``[B, 1]`` or per token of ``other``; checked."""
    if not isinstance(value, Tensor):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ValueError(f"{name}: got {value!r}, want a number from 0 to 1, or a tensor")
        return float(value), None
    if value.dtype not in (*checks.FLOATS, *checks.INTEGERS, torch.bool):
        raise TypeError(f"{name}: got dtype {value.dtype}, want float, integer or bool")
    checks.check_device(name, value, device, other)
    if value.dim() == 0:
        raise ValueError(
            f"{name}: got a tensor of no dimensions, want a number, or a value per row or per token"
        )
    if tuple(value.shape) == (rows.batch,):
        found = value.detach()[:, None]
    elif tuple(value.shape) == rows.shape:
        if hole == "decay":
            raise ValueError(
                f"{name}: got a value per token with hole='decay', want one per row, or hole='hold'"
            )
        found = value.detach()
    else:
        want = f"[{rows.batch}] or {checks.show(rows.shape)} (one per row or per token of {other})"
        raise ValueError(f"{name}: got shape {checks.show(value.shape)}, want {want}")
    if may_read(found):
        read = found if rows.mask is None or tuple(value.shape) == (rows.batch,) else found[rows.mask]
        if not bool(((read >= 0) & (read <= 1)).all()):
            raise ValueError(f"{name}: got a value outside 0 to 1")
    return 1.0, found.to(torch.float64)


def scan(  # type: ignore[no-untyped-def]
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    hole: str,
    rho: Tensor | None = None,
    trace: Tensor | None = None,
    names: tuple[str, str] = ("rewards", "values"),
):
    """Advantages and returns, and the layout, of rewards and values that go by ``names``."""
    name, of_values = names
    checks.check_float(name, rewards)
    checks.check_choice("hole", hole, HOLES)
    rows = checks.token_layout(name, rewards, mask, cu_seqlens)
    checks.check_values(name, rewards, rows.mask)
    if values is not None:
        checks.check_like(of_values, values, rewards, name)
        checks.check_values(of_values, values, rows.mask)
    factors = [
        factor(key, x, rows, rewards.device, name, hole) for key, x in (("gamma", gamma), ("lam", lam))
    ]
    if bootstrap is not None:
        checks.check_rows("bootstrap", bootstrap, rows.batch, rewards.device, name)
        if values is None:
            values = torch.zeros_like(rewards)
    given = [t for t in (rewards, values, bootstrap, rho, trace) if t is not None]
    wide = iter(checks.promote(*given))
    tensors = [None if t is None else next(wide) for t in (rewards, values, bootstrap, rho, trace)]
    return rows, _td(
        *tensors, factors[0][1], factors[1][1], rows.mask, rows.cu_seqlens, factors[0][0], factors[1][0],
        hole == "decay",
    )  # fmt: skip


def discounted_returns(
    rewards: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hole: str = "hold",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``G[t] = r[t] + gamma * G[t + 1]`` along every row.

    Args:
        rewards: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        gamma, mask, cu_seqlens, hole: as in :func:`gae`. bootstrap: ``[B]``, the return after the last token.
        process_group: of sequence parallelism (context parallelism with consecutive parts): each of its ranks has
            the next part of every row, of any length, none included; the first rank has the first. ``mask``,
            ``cu_seqlens`` and factors per token are those of the part; ``bootstrap``, after the whole row, and
            factors per row are the same on every rank. One collective, of a few numbers per row, and a scan or two
            more. Not with ``hole="decay"``.

    Returns:
        The layout of ``rewards``, float32 (float64 for float64), 0 where masked. Differentiable in ``rewards`` and
        ``bootstrap``.
    """
    beyond = _beyond(process_group, rewards, None, bootstrap, gamma, 1.0, mask, cu_seqlens, hole)
    _, (out, _) = scan(rewards, None, beyond, gamma, 1.0, mask, cu_seqlens, hole)
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
    hole: str = "hold",
    process_group: ProcessGroup | None = None,
) -> GAE:
    """Generalised advantage estimation (arXiv 1506.02438), not whitened.

    ``A[t] = delta[t] + gamma * lam * A[t + 1]`` with ``delta[t] = r[t] + gamma * V[t + 1] - V[t]``, and
    ``returns = A + V``. Over masked tokens inside a row, ``hole="hold"`` passes: the next token is the next valid
    one (verl, NeMo-RL, AReaL). ``hole="decay"`` takes them for steps of reward and value 0 (OpenRLHF, slime).
    Masked tokens after a row's last valid one are no part of it.

    Args:
        rewards, values: ``[B, T]``, or ``[N]`` with ``cu_seqlens``; float32, bfloat16, float16 or float64.
        gamma, lam: 0 to 1; a number, or a tensor with one per row ``[B]`` or per token (where both fit: per row).
            No gradient flows into them.
        bootstrap: ``[B]``, the value after the last token of a row that was cut off; None for 0.
        mask: the shape of ``rewards``; bool, integer or float 0/1; may have holes.
        cu_seqlens: ``[B + 1]`` for packed rows.
        process_group: of sequence parallelism: each of its ranks has the next part of every row, see
            :func:`discounted_returns`.

    Returns:
        :class:`GAE`, the layout of ``rewards``; float32 (float64 where an input is), 0 where masked. Sums are
        taken in float64. Differentiable in ``rewards``, ``values`` and ``bootstrap``. A factor of 0 cuts: what lies
        beyond it does not matter, not even when it is infinite.

    Raises:
        TypeError: a dtype that is not accepted. ValueError: a shape or device that does not match, a number out of
            its range, factors per token with ``hole="decay"``.
    """
    checks.check_tensor("values", values)
    beyond = _beyond(process_group, rewards, values, bootstrap, gamma, lam, mask, cu_seqlens, hole)
    _, found = scan(rewards, values, beyond, gamma, lam, mask, cu_seqlens, hole)
    return GAE(*found)


def _beyond(
    process_group: ProcessGroup | None,
    rewards: Tensor,
    values: Tensor | None,
    bootstrap: Tensor | None,
    gamma: float | Tensor,
    lam: float | Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    hole: str,
) -> Tensor | None:
    """The value after the last token of a row, or of this rank's part of it."""
    if process_group is None:
        return bootstrap
    distributed.check(process_group)
    checks.check_choice("hole", hole, HOLES)
    if hole != "hold":
        raise ValueError(f"hole: got {hole!r} with process_group, want 'hold'")
    rows = (mask, cu_seqlens)
    found = _value_beyond(process_group, rewards, values, bootstrap, gamma, lam, *rows)
    return found.to(checks.promote(*(t for t in (rewards, values, bootstrap) if t is not None))[0].dtype)


def lambda_returns(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float | Tensor = 1.0,
    lam: float | Tensor = 1.0,
    bootstrap: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    hole: str = "hold",
    process_group: ProcessGroup | None = None,
) -> Tensor:
    """``G[t] = r[t] + gamma * ((1 - lam) * V[t + 1] + lam * G[t + 1])``, TD(lambda): :func:`gae`'s."""
    found = gae(
        rewards,
        values,
        gamma=gamma,
        lam=lam,
        bootstrap=bootstrap,
        mask=mask,
        cu_seqlens=cu_seqlens,
        hole=hole,
        process_group=process_group,
    )
    return found.returns


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
    ``advantage[t] = min(advantage_rho_clip, ratio) (r[t] + gamma (lam target[t+1] + (1 - lam) V[t+1]) - V[t])``, as
    in rlax. Masked tokens inside a row are passed over.

    Args:
        rewards, values, gamma, lam, bootstrap, mask, cu_seqlens: as in :func:`gae`.
        log_ratio: the shape of ``rewards``: log-probability under the policy less that under the behaviour policy.
            No gradient flows into it.
        rho_clip, trace_clip, advantage_rho_clip: None for no bound.

    Returns:
        :class:`VTrace`, the layout of ``rewards``, 0 where masked. Differentiable in ``rewards``, ``values`` and
        ``bootstrap``.
    """
    checks.check_float("rewards", rewards)
    checks.check_like("log_ratio", log_ratio, rewards, "rewards")
    checks.check_like("values", values, rewards, "rewards")
    ratio = checks.promote(log_ratio.detach())[0].exp()
    bounds = []
    clips = {"rho_clip": rho_clip, "trace_clip": trace_clip, "advantage_rho_clip": advantage_rho_clip}
    for name, clip in clips.items():
        if clip is not None:
            checks.check_non_negative(name, clip)
        bounds.append(ratio if clip is None else ratio.clamp(max=clip))
    rho, trace, own = bounds
    options = (gamma, lam, mask, cu_seqlens, "hold")
    rows, (excess, targets) = scan(rewards, values, bootstrap, *options, rho, trace)
    scale = lam
    if isinstance(lam, Tensor):
        scale = lam.detach().to(excess.dtype)
        scale = rows.expand(scale) if tuple(lam.shape) == (rows.batch,) else scale
    carried = excess * scale
    ahead = values.to(excess.dtype) + carried
    # r + gamma ahead[t+] - V, as the difference in `ahead` and what that puts before V.
    _, (found, _) = scan(rewards, ahead, bootstrap, gamma, 0.0, *options[2:])
    advantages = own * (found + carried)
    if rows.mask is not None:
        advantages = torch.where(rows.mask, advantages, 0)
    return VTrace(targets, advantages)
