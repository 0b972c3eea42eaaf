"""``torch.ops.rewardops`` with tensors that its kernels do not expect: a named error, never a wrong read."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import rewardops
from rewardops.testing.calls import LAYOUTS, calls, make_batch


class Recorder(TorchDispatchMode):
    """The arguments of one call of every op that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "rewardops":
            absent = tuple(a is None for a in args)
            self.seen.setdefault((op, absent), args)
        return op(*args, **(kwargs or {}))


def recorded(layout: str) -> list:
    batch = make_batch(layout=layout, dtype=torch.float32)
    with Recorder() as recorder:
        for call in calls(batch):
            inputs = [x.detach().requires_grad_(call.differentiable) for x in call.inputs]
            outputs = [t for t in tree_leaves(call.fn(*inputs)) if isinstance(t, Tensor) and t.requires_grad]
            if outputs:
                torch.autograd.grad([t.sum() for t in outputs], inputs, allow_unused=True)
    return list(recorder.seen.items())


def spoiled(tensor: Tensor):
    """Tensors that differ from one in dtype, layout, shape or number of dimensions."""
    for dtype in (
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.int32,
        torch.int64,
        torch.bool,
    ):
        if dtype is not tensor.dtype:
            yield tensor.to(dtype)
    yield tensor[..., None]
    if tensor.dim():
        yield tensor[0]
        yield tensor.to_sparse() if tensor.dtype is not torch.bool else tensor[0]
    for dim in range(tensor.dim()):
        if tensor.shape[dim]:
            yield tensor.narrow(dim, 0, tensor.shape[dim] - 1)
        yield torch.cat([tensor, tensor], dim)


def places(args):
    """Every tensor of the arguments, in lists too, with a function that puts another in its place."""
    for k, value in enumerate(args):
        if isinstance(value, Tensor):
            yield value, lambda other, k=k: (*args[:k], other, *args[k + 1 :])
        elif isinstance(value, list):
            for i, t in enumerate(value):
                if isinstance(t, Tensor):
                    yield (
                        t,
                        lambda other, k=k, i=i, v=value: (
                            *args[:k],
                            [*v[:i], other, *v[i + 1 :]],
                            *args[k + 1 :],
                        ),
                    )


def outcome(op, args, backend: str):
    """The error's message and None, or None and the result."""
    try:
        with rewardops.use_backend(backend):
            return None, op(*args)
    except (TypeError, ValueError) as error:
        return str(error), None
    except IndexError:  # offsets beyond the tokens, in the reference: kernels read none of those
        return "offsets: got ", None


def summary(args) -> list:
    """The arguments with dtypes and shapes in place of tensors."""
    return tree_map(lambda a: f"{a.dtype}{list(a.shape)}" if isinstance(a, Tensor) else a, list(args))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_unexpected_tensors(backend, layout):
    """A tensor of another dtype, shape or layout is refused, or taken right: then reference and backend agree."""
    accepted = 0
    for (op, _), args in recorded(layout):
        for tensor, put in places(args):
            for other in spoiled(tensor):
                changed = [a.clone() if isinstance(a, Tensor) and not a.is_sparse else a for a in put(other)]
                message, out = outcome(op, changed, backend)
                if message is not None:
                    assert ": got " in message, (op, message)
                    continue
                accepted += 1
                again = [a.clone() if isinstance(a, Tensor) else a for a in put(other)]
                message, want = outcome(op, again, "reference")
                if message is not None:
                    continue
                for a, b in zip(tree_leaves(out), tree_leaves(want), strict=True):
                    # Saved numbers no longer belong to logits of another dtype, nor offsets to fewer tokens.
                    if a is not None and (layout == "packed" or "token_stats" in str(op)):
                        assert (a.shape, a.dtype) == (b.shape, b.dtype)
                    elif a is not None:
                        near = 2e-2 if a.dtype in (torch.float16, torch.bfloat16) else 1e-3
                        explained = functools.partial("{}{}: {}".format, op, summary(changed))
                        torch.testing.assert_close(a, b, rtol=near, atol=near, equal_nan=True, msg=explained)
    assert accepted < 400
