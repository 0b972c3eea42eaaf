"""Calls of the raw ops, ``torch.ops.rewardops``: recorded, and with one tensor that their kernels do not expect."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from rewardops import use_backend

Args = Sequence[Any]


class Recorder(TorchDispatchMode):
    """The arguments of one call of every op that runs, for each set of arguments that are None."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[Any, tuple[bool, ...]], Args] = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "rewardops":
            absent = tuple(a is None for a in args)
            # Ops may write over their arguments.
            self.seen.setdefault((op, absent), copied(args))
        return op(*args, **(kwargs or {}))


def copied(args: Args) -> Args:
    def copy(a: Any) -> Any:
        return a.detach().clone() if isinstance(a, Tensor) and a.layout is torch.strided else a

    return tree_map(copy, list(args))


DTYPES = (
    torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.bool,
)  # fmt: skip


def spoiled(tensor: Tensor) -> Iterator[Tensor]:
    """Tensors that differ from one in dtype, layout, shape or number of dimensions."""
    yield from (tensor.to(dtype) for dtype in DTYPES if dtype is not tensor.dtype)
    yield tensor[..., None]
    if tensor.dim() and len(tensor):
        yield tensor[0]
    if tensor.dim() and tensor.dtype is not torch.bool:
        yield tensor.to_sparse()
    for dim in range(tensor.dim()):
        if tensor.shape[dim]:
            yield tensor.narrow(dim, 0, tensor.shape[dim] - 1)
            yield torch.cat([tensor, tensor], dim)


def places(op: Any, args: Args) -> Iterator[tuple[str, Tensor, Callable[[Tensor], list[Any]]]]:
    """Every tensor of the arguments, in lists too: its name, and a function that puts another in its place."""

    def put(values: Args, k: int, other: Any) -> list[Any]:
        return [*values[:k], other, *values[k + 1 :]]

    for k, (value, described) in enumerate(zip(args, op._schema.arguments, strict=False)):
        if isinstance(value, Tensor):
            yield described.name, value, lambda other, k=k: put(args, k, other)
        elif isinstance(value, list):
            for i, t in enumerate(value):
                if isinstance(t, Tensor):
                    yield (
                        f"{described.name}[{i}]",
                        t,
                        lambda other, k=k, i=i, v=value: put(args, k, put(v, i, other)),
                    )


def outcome(op: Any, args: Args, backend: str) -> tuple[str | None, Any]:
    """The error's message and None, or None and the result; arguments that it writes over are copied."""
    try:
        with use_backend(backend):
            return None, op(*copied(args))
    except (TypeError, ValueError) as error:
        return str(error), None
    except IndexError as error:  # torch's own, for numbers that are no places in what they index
        return f"IndexError: got {error}", None


def beyond_offsets(op: Any, args: Args) -> bool:
    """True for offsets that do not end where the tokens do: kernels clamp them, which is no result to compare."""
    names = [a.name for a in op._schema.arguments]
    if "cu_seqlens" not in names or (cu := args[names.index("cu_seqlens")]) is None or not len(cu):
        return False
    return any(
        a.dim() == 1 and len(a) not in (int(cu[-1]), len(cu), len(cu) - 1)
        for a in args
        if isinstance(a, Tensor)
    )


def check_refused_or_right(op: Any, args: Args, backend: str, what: str, rounded: bool = False) -> bool:
    """True for arguments that are taken, of which backend and reference agree; else the error names what it got.

    Args:
        what: the op and its argument. rounded: numbers that others are not of any more, as gradients of logits in
            half precision with sums of those before; results are not compared.
    """
    try:
        message, out = outcome(op, args, backend)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    if message is not None:
        assert ": got " in message, f"{what}: {message}"
        return False
    if rounded or beyond_offsets(op, args):
        return True
    message, want = outcome(op, args, "reference")
    assert message is None, f"{what}: {backend} takes what the reference refuses: {message}"
    for a, b in zip(tree_leaves(out), tree_leaves(want), strict=True):
        if a is not None:
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=1e-3, equal_nan=True, msg=lambda m: f"{what}: {m}"
            )
    return True
