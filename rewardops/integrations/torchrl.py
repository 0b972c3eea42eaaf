"""torchrl: its value estimators as one scan on the device, with torchrl's names and arguments.

Every function here takes ``[*B, T, F]`` with time at ``time_dim``, like those of
``torchrl.objectives.value.functional`` do, and returns the dtype of the values. ``done`` ends a trajectory, also
within a row; ``terminated`` marks ends without a bootstrap; ``next_state_value`` is the value of the successor
state, which after a truncation is not that of the next step. :func:`patch` makes torchrl's estimators and losses
call these functions. Written against torchrl 0.14.1.

What differs: no gradient flows into gamma, lambda and log-probabilities; gamma and lambda are from 0 to 1; values
after a termination are not read, so they may be NaN; no small power of gamma is dropped. No function synchronises
with the device, except for V-trace thresholds that are device tensors.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchrl.objectives.value import advantages, functional

import rewardops

from ..core import checks
from .replacing import replace

__all__ = [
    "generalized_advantage_estimate", "patch", "reward2go", "td1_advantage_estimate", "td1_return_estimate",
    "td_lambda_advantage_estimate", "td_lambda_return_estimate", "vtrace_advantage_estimate",
]  # fmt: skip

# ---- rows of time ------------------------------------------------------------------------------------------


def _checked(time_dim: int, reward: Tensor, done: Tensor, **others: Tensor) -> int:
    """Validate shapes and flags; return the time dimension as a non-negative index."""
    if not -reward.dim() <= time_dim < reward.dim():
        raise ValueError(f"time_dim: got {time_dim}, want a dimension of reward {list(reward.shape)}")
    for name, tensor in {"done": done, **others}.items():
        if tensor.shape != reward.shape:
            raise ValueError(f"{name}: got shape {list(tensor.shape)}, want {list(reward.shape)}, as reward")
    for name in ("done", "terminated"):
        flags = {"done": done, **others}.get(name)
        if flags is not None and flags.dtype is not torch.bool:
            raise TypeError(f"{name}: got dtype {flags.dtype}, want bool")
    return time_dim % reward.dim()


def _factor(name: str, value: float | Tensor, like: Tensor) -> float | Tensor:
    """Validate a discount: a number, a tensor of one number, or one per step."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() == 1:
        return value.detach().reshape(()).to(like.device)
    if value.shape != like.shape:
        raise ValueError(f"{name}: got shape {list(value.shape)}, want a number, or {list(like.shape)}")
    return value.detach()


def _threshold(name: str, value: float | Tensor) -> float:
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: got shape {list(value.shape)}, want a number, or a tensor of one")
    return float(value)


def _wide(*tensors: Tensor) -> list[Tensor]:
    dtype = torch.float64 if any(t.dtype is torch.float64 for t in tensors) else torch.float32
    return [t.to(dtype) for t in tensors]


def _rows(x: Tensor, dim: int) -> Tensor:
    """Reshape to ``[rows, T]``; a view with a single feature."""
    return x.movedim(dim, -1).reshape(-1, x.shape[dim])


def _back(rows: Tensor, like: Tensor, dim: int) -> Tensor:
    return rows.reshape(like.movedim(dim, -1).shape).movedim(-1, dim)


def _unless(ends: Tensor, *factors: float | Tensor) -> Tensor:
    """The product of the factors in float64 (the dtype of the scan), 0 at the ends of trajectories."""
    product: float | Tensor = 1.0
    for factor in factors:
        product = product * (factor.double() if isinstance(factor, Tensor) else factor)
    if isinstance(product, Tensor):
        return product.expand(ends.shape).masked_fill(ends, 0)
    whole = torch.full(ends.shape, product, dtype=torch.float64, device=ends.device)
    return whole.masked_fill_(ends, 0)


def _discounted(x: Tensor, ends: Tensor, dim: int, *factors: float | Tensor) -> Tensor:
    """``G[t] = x[t] + factors[t] G[t + 1]`` along time; ``G[t] = x[t]`` at an end."""
    gamma = _unless(_rows(ends, dim), *(_flat(factor, dim) for factor in factors))
    return _back(rewardops.discounted_returns(_rows(x, dim), gamma=gamma), x, dim)


def _flat(factor: float | Tensor, dim: int) -> float | Tensor:
    return _rows(factor, dim) if isinstance(factor, Tensor) and factor.dim() else factor


def _one_step(reward: Tensor, next_value: Tensor, gamma: Any, terminated: Tensor) -> Tensor:
    return torch.where(terminated, reward, reward + gamma * next_value)


# ---- torchrl's functions -----------------------------------------------------------------------------------


def generalized_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    *,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438), for both of torchrl's functions.

    Args:
        gamma, lmbda: 0 to 1; a number, a tensor of one, or a tensor of the shape of ``reward``.
        state_value, next_state_value, reward: the same shape; float32, bfloat16, float16 or float64.
        done, terminated: bool, that shape; ``terminated`` is ``done`` by default.

    Returns:
        Advantages, and the targets of the values, ``advantage + state_value``. Differentiable in the values and
        in ``reward``.

    Raises:
        TypeError: flags that are not bool. ValueError: shapes that differ.
    """
    terminated = done if terminated is None else terminated
    values = {"state_value": state_value, "next_state_value": next_state_value}
    dim = _checked(time_dim, reward, done, terminated=terminated, **values)
    dtype = next_state_value.dtype
    gamma, lmbda = _factor("gamma", gamma, reward), _factor("lmbda", lmbda, reward)
    reward, value, next_value = _wide(reward, state_value, next_state_value)
    delta = _one_step(reward, next_value, gamma, terminated) - value
    advantage = _discounted(delta, done, dim, gamma, lmbda)
    return advantage.to(dtype), (advantage + value).to(dtype)


def _lambda_returns(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None,
    time_dim: int,
    **others: Tensor,
) -> Tensor:
    """TD(lambda) returns in float32 or float64."""
    terminated = done if terminated is None else terminated
    others["next_state_value"] = next_state_value
    dim = _checked(time_dim, reward, done, terminated=terminated, **others)
    gamma, lmbda = _factor("gamma", gamma, reward), _factor("lmbda", lmbda, reward)
    reward, next_value = _wide(reward, next_state_value)
    # The last step has no successor in the row: it bootstraps like the end of a trajectory.
    ends = done.clone()
    ends.narrow(dim, -1, 1).fill_(True)
    bootstrapped = (1 - _unless(ends, lmbda)).to(reward.dtype)
    targets = _one_step(reward, bootstrapped * next_value, gamma, terminated)
    return _discounted(targets, ends, dim, gamma, lmbda)


def td_lambda_return_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    """TD(lambda) returns, for both of torchrl's functions. ``lmbda=0`` is its TD(0).

    Args:
        rolling_gamma: ``False`` (a separate discount for the trajectory from each step) is left to torchrl.
        The rest: as in :func:`generalized_advantage_estimate`.

    Returns:
        The shape of ``reward``. Differentiable in ``next_state_value`` and ``reward``.
    """
    where = (next_state_value, reward, done, terminated)
    if rolling_gamma is False:
        return _torchrls["td_lambda_return_estimate"](gamma, lmbda, *where, False, time_dim=time_dim)
    return _lambda_returns(gamma, lmbda, *where, time_dim).to(next_state_value.dtype)


def td_lambda_advantage_estimate(
    gamma: float | Tensor,
    lmbda: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
) -> Tensor:
    """:func:`td_lambda_return_estimate` minus ``state_value``; differentiable in ``state_value`` too."""
    where = (next_state_value, reward, done, terminated)
    if rolling_gamma is False:
        return _torchrls["td_lambda_advantage_estimate"](gamma, lmbda, state_value, *where, False, time_dim)
    returns = _lambda_returns(gamma, lmbda, *where, time_dim, state_value=state_value)
    return (returns - state_value).to(next_state_value.dtype)


def td1_return_estimate(
    gamma: float | Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    *,
    time_dim: int = -2,
) -> Tensor:
    """TD(1) returns, for both of torchrl's functions: discounted rewards, and the value where a trajectory is cut.

    The arguments are those of :func:`td_lambda_return_estimate`.
    """
    if rolling_gamma is False:
        where = (next_state_value, reward, done, terminated)
        return _torchrls["td1_return_estimate"](gamma, *where, False, time_dim=time_dim)
    terminated = done if terminated is None else terminated
    # torchrl's TD(1) ends a trajectory at a termination even where `done` is False.
    where = (next_state_value, reward, done | terminated, terminated)
    return td_lambda_return_estimate(gamma, 1.0, *where, time_dim=time_dim)


def td1_advantage_estimate(
    gamma: float | Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rolling_gamma: bool | None = None,
    time_dim: int = -2,
) -> Tensor:
    """:func:`td1_return_estimate` minus ``state_value``; differentiable in ``state_value`` too."""
    if rolling_gamma is False:
        where = (state_value, next_state_value, reward, done, terminated)
        return _torchrls["td1_advantage_estimate"](gamma, *where, False, time_dim)
    terminated = done if terminated is None else terminated
    where = (state_value, next_state_value, reward, done | terminated, terminated)
    return td_lambda_advantage_estimate(gamma, 1.0, *where, time_dim=time_dim)


def vtrace_advantage_estimate(
    gamma: float | Tensor,
    log_pi: Tensor,
    log_mu: Tensor,
    state_value: Tensor,
    next_state_value: Tensor,
    reward: Tensor,
    done: Tensor,
    terminated: Tensor | None = None,
    rho_thresh: float | Tensor = 1.0,
    c_thresh: float | Tensor = 1.0,
    time_dim: int = -2,
) -> tuple[Tensor, Tensor]:
    """V-trace (arXiv 1802.01561), as in torchrl.

    Args:
        log_pi, log_mu: log-probabilities under the policy and under the behaviour policy; the shape of
            ``reward``.
        rho_thresh, c_thresh: numbers, or tensors of one.
        The rest: as in :func:`generalized_advantage_estimate`.

    Returns:
        Advantages, and the targets of the values. Differentiable in the values and in ``reward``.
    """
    terminated = done if terminated is None else terminated
    tensors = {
        "log_pi": log_pi,
        "log_mu": log_mu,
        "state_value": state_value,
        "next_state_value": next_state_value,
    }
    dim = _checked(time_dim, reward, done, terminated=terminated, **tensors)
    dtype = next_state_value.dtype
    gamma = _factor("gamma", gamma, reward)
    reward, value, next_value, log_pi, log_mu = _wide(reward, state_value, next_state_value, log_pi, log_mu)
    log_ratio = (log_pi - log_mu).detach()
    delta = _rows(_one_step(reward, next_value, gamma, terminated) - value, dim)
    rho_clip, trace_clip = _threshold("rho_thresh", rho_thresh), _threshold("c_thresh", c_thresh)
    # V-trace of these deltas with values of 0 gives the targets minus the values.
    above = rewardops.vtrace(
        delta,
        torch.zeros_like(delta),
        _rows(log_ratio, dim),
        gamma=_unless(_rows(done, dim), _flat(gamma, dim)),
        rho_clip=rho_clip,
        trace_clip=trace_clip,
        advantage_rho_clip=None,
    ).targets
    targets = _back(above, value, dim) + value
    ahead = torch.cat([targets.narrow(dim, 1, targets.shape[dim] - 1), next_value.narrow(dim, -1, 1)], dim)
    ahead = torch.where(done, next_value, ahead)
    rho = log_ratio.exp().clamp(max=rho_clip)
    advantage = rho * (_one_step(reward, ahead, gamma, terminated) - value)
    return advantage.to(dtype), targets.to(dtype)


def reward2go(reward: Tensor, done: Tensor, gamma: float | Tensor, *, time_dim: int = -2) -> Tensor:
    """Discounted rewards until the trajectory ends, the shape and dtype of ``reward``."""
    dim = _checked(time_dim, reward, done)
    gamma = _factor("gamma", gamma, reward)
    (wide,) = _wide(reward)
    return _discounted(wide, done, dim, gamma).to(reward.dtype)


# ---- in their place ----------------------------------------------------------------------------------------

_OURS: dict[str, Callable[..., Any]] = {
    "generalized_advantage_estimate": generalized_advantage_estimate,
    "vec_generalized_advantage_estimate": generalized_advantage_estimate,
    "td_lambda_return_estimate": td_lambda_return_estimate,
    "vec_td_lambda_return_estimate": td_lambda_return_estimate,
    "td_lambda_advantage_estimate": td_lambda_advantage_estimate,
    "vec_td_lambda_advantage_estimate": td_lambda_advantage_estimate,
    "td1_return_estimate": td1_return_estimate,
    "vec_td1_return_estimate": td1_return_estimate,
    "td1_advantage_estimate": td1_advantage_estimate,
    "vec_td1_advantage_estimate": td1_advantage_estimate,
    "vtrace_advantage_estimate": vtrace_advantage_estimate,
    "reward2go": reward2go,
}
_torchrls: dict[str, Callable[..., Any]] = {name: getattr(functional, name) for name in _OURS}
_INITS: dict[Any, Callable[..., None]] = {
    estimator: estimator.__init__
    for estimator in (
        advantages.GAE,
        advantages.TD1Estimator,
        advantages.TDLambdaEstimator,
        advantages.VTrace,
    )
}


def _check_estimator(estimator: Any) -> None:
    """Check the numbers of one of torchrl's estimators, which these functions see only with the first data."""
    for name in ("gamma", "lmbda", "rho_thresh", "c_thresh"):
        value = getattr(estimator, name, None)
        if value is None or value.is_meta:
            continue
        if name in ("rho_thresh", "c_thresh"):
            checks.check_non_negative(name, _threshold(name, value))
        elif not bool(((value >= 0) & (value <= 1)).all()):
            got = value.item() if value.numel() == 1 else "some outside"
            raise ValueError(f"{name}: got {got}, want numbers from 0 to 1")


def _checked_init(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        _check_estimator(self)

    return checked


def patch() -> Callable[[], None]:
    """Make ``GAE``, ``TDLambdaEstimator``, ``TD1Estimator``, ``VTrace`` and their losses call these functions.

    An estimator that is built from here on checks gamma, lambda and the thresholds of V-trace as it is built.

    Returns:
        A function that undoes it.
    """
    undo = replace("torchrl", {name: (_torchrls[name], ours) for name, ours in _OURS.items()})
    for estimator, init in _INITS.items():
        estimator.__init__ = _checked_init(init)  # type: ignore[misc]

    def restore() -> None:
        undo()
        for estimator, init in _INITS.items():
            estimator.__init__ = init  # type: ignore[misc]

    return restore
