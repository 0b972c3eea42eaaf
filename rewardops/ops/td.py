"""Ops of the td family, and compositions of its scan: step ends, sums of steps, first and last tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.dispatch import define
from ..core.kinds import Flags, Offsets, RealTokens, WideTokens
from ..core.precision import widest
from ..core.records import save_record, saved_record, schema_of
from ..core.rows import Layout, batch_of
from ..reference import td as spec
from ..reference.td import TdArgs
from .segments import row_sums

_ARGS = schema_of(TdArgs)


# ---- temporal differences ----------------------------------------------------------------------------------


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    (args,) = inputs
    ctx.set_materialize_grads(False)
    ctx.wanted = args.values is not None, args.bootstrap is not None
    save_record(ctx, args._replace(values=None, bootstrap=None))  # a scan is linear in them


def _gradient(ctx, grad, grad_returns):  # type: ignore[no-untyped-def]
    to_values, to_bootstrap = ctx.wanted
    grad_returns = grad_returns if to_values else None  # without values, returns are an empty tensor
    if grad is None and grad_returns is None:
        return {}
    args, _ = saved_record(ctx)
    on_rewards, on_values, on_bootstrap = td_scan_backward(grad, grad_returns, *args, *ctx.wanted)
    return {
        "rewards": on_rewards,
        "values": on_values if to_values else None,
        "bootstrap": on_bootstrap if to_bootstrap else None,
    }


def _fake_backward(
    grad: Tensor | None, grad_returns: Tensor | None, args: TdArgs, to_values: bool, to_bootstrap: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rewards = args.rewards
    batch = batch_of(rewards.shape, args.cu_seqlens)
    return (
        rewards.new_empty(rewards.shape),
        rewards.new_empty(rewards.shape if to_values else 0),
        rewards.new_empty(batch if to_bootstrap else 0),
    )


td_scan_backward = define(
    "td",
    f"td_scan_backward(Tensor? grad, Tensor? grad_returns, {_ARGS}, bool to_values, bool to_bootstrap)"
    " -> (Tensor, Tensor, Tensor)",
    record=TdArgs,
    tensors={"grad": RealTokens, "grad_returns": RealTokens},
    fake=_fake_backward,
)

td_scan = define(
    "td",
    f"td_scan({_ARGS}) -> (Tensor advantages, Tensor returns)",
    record=TdArgs,
    fake=lambda args: (
        args.rewards.new_empty(args.rewards.shape),
        args.rewards.new_empty(0 if args.values is None else args.rewards.shape),
    ),
    setup_context=_setup,
    backward=_gradient,
)


# ---- sums and differences from the left --------------------------------------------------------------------

_ALONG_ROWS = {"x": RealTokens, "factors": WideTokens, "mask": Flags, "cu_seqlens": Offsets}

_prefix_scan = define(
    "td",
    "prefix_scan(Tensor x, Tensor? factors, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    tensors=_ALONG_ROWS,
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    backward=lambda ctx, grad: {"x": td_scan(*spec.adjoint_of_prefix_scan(grad, *ctx.saved_tensors))[0]},
)

_differences = define(
    "td",
    "differences(Tensor x, Tensor? mask, Tensor? cu_seqlens) -> Tensor",
    tensors=_ALONG_ROWS,
    fake=lambda x, *_: x.new_empty(x.shape),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[1:]),
    backward=lambda ctx, grad: {"x": -td_scan(*spec.adjoint_of_differences(grad, *ctx.saved_tensors))[0]},
)


def prefix_scan(x: Tensor, factors: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``u[t] = x[t] + factors[t-] u[t-]`` with ``t-`` the valid token before; factors are float64, None for 1."""
    out: Tensor = _prefix_scan(x, factors, mask, cu_seqlens)
    return out


def differences(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """``x[t] - x[t-]`` with ``t-`` the valid token before, and 0 before the first of a row."""
    out: Tensor = _differences(x, mask, cu_seqlens)
    return out


# ---- steps -------------------------------------------------------------------------------------------------


def step_ends(markers: Tensor, rows: Layout) -> Tensor:
    """Flags of the tokens that end a step: bool, the layout of the markers.

    The markers come from :func:`rewardops.core.checks.step_markers`. With ids, a step ends at the last valid token
    before another id; negative ids belong to no step.
    """
    return spec.step_ends(lambda args: td_scan(*args), markers, rows)


def sums_between(x: Tensor, ends: Tensor, rows: Layout) -> Tensor:
    """At each end, the sum of the valid tokens after the previous end, up to and including it; 0 elsewhere."""
    return spec.sums_between(prefix_scan, x, ends, rows)


def last_tokens(rows: Layout, device: torch.device) -> Tensor:
    """The last valid token of every row: bool, per token."""
    return step_ends(torch.zeros(rows.shape, dtype=torch.int64, device=device), rows)


def first_tokens(rows: Layout, device: torch.device) -> Tensor:
    """The first valid token of every row: bool, per token."""
    ones = torch.ones(rows.shape, dtype=widest(device), device=device)
    count = prefix_scan(ones, ones, rows.mask, rows.cu_seqlens)
    return (count == 1) & rows.valid(device)


def at_marked(x: Tensor, marked: Tensor, rows: Layout) -> Tensor:
    """``[B]``, the value of ``x`` at the one marked token of each row; 0 where there is none."""
    return row_sums(torch.where(marked, x, 0), rows)
