"""Argument checks: each names the argument, what it got and what it wants, before a kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .rows import Layout, to_rows
from .settings import debugging, is_traced, may_read

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
MASKS = (torch.bool, *INTEGERS, *FLOATS)


def show(shape: Sequence[object]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def check_tensor(name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, want a torch.Tensor")
    return value


def check_float(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got dtype {value.dtype}, want float32, bfloat16, float16 or float64")


def check_integer(name: str, value: Tensor) -> None:
    check_tensor(name, value)
    if value.dtype not in INTEGERS:
        raise TypeError(f"{name}: got dtype {value.dtype}, want an integer dtype")


def check_shape(name: str, value: Tensor, want: Sequence[int], meaning: str) -> None:
    if value.shape != want and tuple(value.shape) != tuple(want):
        raise ValueError(f"{name}: got shape {show(value.shape)}, want {show(want)} ({meaning})")


def check_device(name: str, value: Tensor, device: torch.device, other: str) -> None:
    if value.device != device:
        raise ValueError(f"{name}: got device {value.device}, want {device} (that of {other})")


def check_like(name: str, value: Tensor, like: Tensor, other: str) -> None:
    """A float tensor of the shape and on the device of another argument."""
    check_float(name, value)
    if value.shape != like.shape:
        check_shape(name, value, like.shape, f"the shape of {other}")
    check_device(name, value, like.device, other)


def check_rows(name: str, value: object, batch: int, device: torch.device, other: str) -> None:
    """A float tensor with one value per row of another argument."""
    tensor = check_tensor(name, value)
    check_float(name, tensor)
    check_shape(name, tensor, (batch,), f"one per row of {other}")
    check_device(name, tensor, device, other)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, want one of {', '.join(repr(c) for c in choices)}")


# A float; a tensor of no dimensions where a graph is traced. Records and ops take both for a float.
Number = Any


def check_number(name: str, value: object, want: str = "a number") -> Number:
    """A number that is not NaN, as a float; infinities are accepted.

    A tensor without dimensions is read, which waits for its device. Where it cannot be read, as a graph is traced,
    it is returned without its gradient, and nothing is known of its value.
    """
    if isinstance(value, Tensor):
        if value.dim() != 0 or value.dtype not in (*FLOATS, *INTEGERS):
            raise TypeError(f"{name}: got a tensor {show(value.shape)} of {value.dtype}, want {want}")
        if is_traced(value):
            return value.detach()
        value = value.item()
    elif isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: got {type(value).__name__}, want {want}")
    if value != value:
        raise ValueError(f"{name}: got {value}, want {want}")
    return float(value)


def check_finite(name: str, value: object) -> Number:
    number = check_number(name, value)
    if not (isinstance(number, Tensor) or abs(number) < float("inf")):
        raise ValueError(f"{name}: got {value}, want a finite number")
    return number


def check_positive(name: str, value: object) -> Number:
    number = check_number(name, value, "a number above 0")
    if not (isinstance(number, Tensor) or 0.0 < number < float("inf")):
        raise ValueError(f"{name}: got {value}, want a finite number above 0")
    return number


def check_non_negative(name: str, value: object) -> Number:
    number = check_number(name, value, "a number of at least 0")
    if not (isinstance(number, Tensor) or 0.0 <= number < float("inf")):
        raise ValueError(f"{name}: got {value}, want a finite number of at least 0")
    return number


def check_fraction(name: str, value: object) -> Number:
    number = check_number(name, value, "a number from 0 to 1")
    if not (isinstance(number, Tensor) or 0 <= number <= 1):
        raise ValueError(f"{name}: got {value!r}, want a number from 0 to 1")
    return number


def check_whole(name: str, value: object, least: int) -> None:
    whole = isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)
    if not whole or value < least:  # type: ignore[operator]
        raise ValueError(f"{name}: got {value!r}, want a whole number of at least {least}")


def check_flag(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}, want True or False")


def check_ddof(value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value not in (0, 1):
        raise ValueError(f"ddof: got {value!r}, want 0 or 1")


def check_rewards(rewards: Tensor, name: str = "rewards") -> None:
    """A float tensor with one value per row."""
    check_float(name, rewards)
    if rewards.dim() != 1:
        raise ValueError(f"{name}: got shape {show(rewards.shape)}, want [B] (one per row)")
    check_values(name, rewards)


def check_eps_ddof(eps: object, ddof: object) -> Number:
    """The validated eps."""
    number = check_non_negative("eps", eps)
    check_ddof(ddof)
    return number


def _first(bad: Tensor, mask: Tensor | None) -> list[int] | None:
    """Index of the first unmasked position where a check fails, or None; reads one number from the device."""
    if mask is not None:
        bad = bad & mask
    return bad.nonzero()[0].tolist() if bool(bad.any()) else None


def check_token_ids(tokens: Tensor, vocab: int, mask: Tensor | None) -> None:
    """Under :func:`debug` only: every unmasked token id is a column of the logits."""
    if where := _first((tokens < 0) | (tokens >= vocab), mask):
        raise ValueError(f"tokens: got {int(tokens[tuple(where)])} at {where}, want ids in [0, {vocab})")


def check_values(name: str, value: Tensor, mask: Tensor | None = None) -> None:
    """Under :func:`debug` only: numbers are finite wherever the mask counts."""
    if not debugging() or not may_read(value):
        return
    if where := _first(~value.detach().isfinite(), mask):
        number = value.detach()[tuple(where)].item()
        raise ValueError(f"{name}: got {number} at {where}, want finite values wherever the mask counts")


def check_step_ids(steps: Tensor, layout: Layout, name: str) -> None:
    """Step ids never fall along a row (negative ids, of no step, aside); reads them."""
    if steps.numel() == 0 or not _may_fall(steps, layout):
        return
    ids, inside = to_rows(steps, None, layout.cu_seqlens)
    valid = inside if layout.mask is None else to_rows(layout.mask, layout.mask, layout.cu_seqlens)[1]
    counted = valid & (ids >= 0)
    bad = counted & (torch.where(counted, ids, -1).cummax(1).values > ids)
    if bool(bad.any()):
        row, t = bad.nonzero()[0].tolist()
        flags = " (flags of step ends are bool)" if bool(((ids == 0) | (ids == 1) | ~counted).all()) else ""
        raise ValueError(
            f"{name}: got id {int(ids[row, t])} after a larger one, at token {t} of row {row}{flags}"
        )


def _may_fall(ids: Tensor, layout: Layout) -> bool:
    """False if no id is below the one before it in its row, masked ones included: a quick look, often enough."""
    fall = ids[..., 1:] < ids[..., :-1]
    if layout.cu_seqlens is not None and fall.numel():
        starts = layout.cu_seqlens[1:-1].to(torch.int64)
        fall[starts[(starts > 0) & (starts < len(ids))] - 1] = False
    return bool(fall.any())


def as_numbers(name: str, value: object, count: int, meaning: str) -> Tensor | list[float]:
    """Validate ``count`` numbers in a tensor, an array or a sequence."""
    if isinstance(value, Tensor):
        if value.dtype not in (*FLOATS, *INTEGERS):
            raise TypeError(f"{name}: got dtype {value.dtype}, want float or integer")
        check_shape(name, value, (count,), meaning)
        return value
    values = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise TypeError(
            f"{name}: got {type(value).__name__}, want a tensor, an array or a sequence of numbers"
        )
    if len(values) != count:
        raise ValueError(f"{name}: got {len(values)}, want {count} ({meaning})")
    for number in values:
        check_finite(name, number)
    return list(values)


def as_mask(mask: object, like: Sequence[int], device: torch.device, other: str) -> Tensor | None:
    """A bool mask of the given shape; integer and float masks of 0 and 1 are accepted.

    Other numbers are refused where a look at them is free (:func:`.settings.may_read`).
    """
    if mask is None:
        return None
    mask = check_tensor("mask", mask)
    if mask.dtype not in MASKS:
        raise TypeError(f"mask: got dtype {mask.dtype}, want bool, integer or float")
    if mask.shape != like:
        check_shape("mask", mask, like, f"one entry per token of {other}")
    check_device("mask", mask, device, other)
    if mask.dtype is torch.bool:
        return mask
    valid = mask.detach() != 0
    if may_read(mask) and (where := _first(valid & (mask.detach() != 1), None)):
        number = mask.detach()[tuple(where)].item()
        raise ValueError(f"mask: got {number} at {where}, want 0 or 1 (a mask is not a weight)")
    return valid


def as_weights(
    mask: object, like: Sequence[int], device: torch.device, other: str
) -> tuple[Tensor | None, Tensor | None]:
    """A mask where it may weigh: the bool mask, and the weights, None where all are 0 or 1.

    A float mask whose numbers cannot be looked at is taken for weights.
    """
    if not isinstance(mask, Tensor) or mask.dtype not in FLOATS:
        return as_mask(mask, like, device, other), None
    check_shape("mask", mask, like, f"one entry per token of {other}")
    check_device("mask", mask, device, other)
    weight = mask.detach()
    valid = weight != 0
    if may_read(weight):
        if not bool(((weight >= 0) & (weight < float("inf"))).all()):
            raise ValueError("mask: got a weight below 0, or not finite, want weights of at least 0")
        if not bool((valid & (weight != 1)).any()):
            return valid, None
    return valid, weight


def promote(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors in the precision of the ops: float64 if any of them is float64, else float32."""
    dtypes = [t.dtype for t in tensors]
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    if dtypes.count(dtype) == len(dtypes):
        return tensors
    return tuple([t if t.dtype is dtype else t.to(dtype) for t in tensors])


# ---- layouts -----------------------------------------------------------------------------------------------


def check_cu_seqlens(
    cu_seqlens: object, device: torch.device, other: str, tokens: int | None, meaning: str | None = None
) -> Tensor:
    """Validate row offsets that end at ``tokens``; ``meaning`` describes that number in the error message."""
    cu = check_tensor("cu_seqlens", cu_seqlens)
    if cu.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"cu_seqlens: got dtype {cu.dtype}, want int32 or int64")
    if cu.dim() != 1 or cu.shape[0] < 1:
        raise ValueError(f"cu_seqlens: got shape {show(cu.shape)}, want [B + 1]")
    check_device("cu_seqlens", cu, device, other)
    if may_read(cu):
        lengths = cu[1:] - cu[:-1]
        first, last = int(cu[0]), int(cu[-1])
        if first != 0:
            raise ValueError(f"cu_seqlens: got first entry {first}, want 0")
        if len(lengths) and int(lengths.min()) < 0:
            row = int((lengths < 0).nonzero()[0])
            a, b = cu[row : row + 2].tolist()
            raise ValueError(f"cu_seqlens: got {a} then {b} at row {row}, want a non-decreasing sequence")
        if tokens is not None and last != tokens:
            raise ValueError(
                f"cu_seqlens: got last entry {last}, want {tokens} ({meaning or f'the tokens of {other}'})"
            )
    return cu.detach()


def token_layout(name: str, values: Tensor, mask: object, cu_seqlens: object) -> Layout:
    """The layout of a per-token tensor: ``[B, T]``, or ``[N]`` with ``cu_seqlens``."""
    if cu_seqlens is None:
        if values.dim() != 2:
            raise ValueError(
                f"{name}: got shape {show(values.shape)}, want [B, T] (or [N] together with cu_seqlens)"
            )
        batch, cu = values.shape[0], None
    else:
        if values.dim() != 1:
            raise ValueError(f"{name}: got shape {show(values.shape)}, want [N] (cu_seqlens was given)")
        cu = check_cu_seqlens(cu_seqlens, values.device, name, values.shape[0])
        batch = cu.shape[0] - 1
    shape = tuple(values.shape)
    return Layout(batch, shape, as_mask(mask, shape, values.device, name), cu)


def row_layout(
    rewards: Tensor, mask: object, cu_seqlens: object, num_tokens: int | None, name: str = "rewards"
) -> Layout | None:
    """The layout of the tokens that per-row values are written to; None without mask and cu_seqlens."""
    batch, device = rewards.shape[0], rewards.device
    if num_tokens is not None:
        check_whole("num_tokens", num_tokens, 0)
    if cu_seqlens is None:
        if num_tokens is not None:
            raise ValueError(f"num_tokens: got {num_tokens} without cu_seqlens, want None")
        if mask is None:
            return None
        mask = check_tensor("mask", mask)
        if mask.dim() != 2 or mask.shape[0] != batch:
            raise ValueError(f"mask: got shape {show(mask.shape)}, want [{batch}, T] (one per row of {name})")
        return Layout(batch, tuple(mask.shape), as_mask(mask, mask.shape, device, name), None)
    cu = check_cu_seqlens(cu_seqlens, device, name, num_tokens, "num_tokens")
    if cu.shape[0] != batch + 1:
        raise ValueError(
            f"cu_seqlens: got shape {show(cu.shape)}, want [{batch + 1}] (one per row of {name}, and one more)"
        )
    if mask is not None:
        mask = check_tensor("mask", mask)
        if mask.dim() != 1 or num_tokens not in (None, mask.shape[0]):
            want = "N" if num_tokens is None else num_tokens
            raise ValueError(f"mask: got shape {show(mask.shape)}, want [{want}] (cu_seqlens was given)")
        num_tokens = mask.shape[0]
        check_cu_seqlens(cu, device, name, num_tokens, "the tokens of mask")
    if num_tokens is None:
        # The size of the output: on a device, reading it would be a synchronisation.
        if not may_read(cu):
            raise ValueError("num_tokens: got None, want the number of packed tokens (or a packed mask)")
        num_tokens = int(cu[-1])
    shape = (num_tokens,)
    return Layout(batch, shape, as_mask(mask, shape, device, name), cu)


def step_markers(
    steps: object, values: Tensor, layout: Layout, other: str, name: str = "steps"
) -> Tensor | None:
    """Step-end flags (bool) or step ids (integer, non-decreasing along a row), the shape of the tokens."""
    if steps is None:
        return None
    steps = check_tensor(name, steps)
    if steps.dtype is not torch.bool:
        if steps.dtype not in INTEGERS:
            raise TypeError(f"{name}: got dtype {steps.dtype}, want bool (step ends) or integer (step ids)")
        steps = steps.to(torch.int64)
    check_shape(name, steps, values.shape, f"one entry per token of {other}")
    check_device(name, steps, values.device, other)
    if steps.dtype is not torch.bool and may_read(steps):
        check_step_ids(steps.detach(), layout, name)
    return steps.detach()
