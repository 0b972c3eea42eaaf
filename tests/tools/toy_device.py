"""A device that is neither a CPU nor a GPU, and has no float64: ``toy``. Its tensors hold tensors of the CPU.

As a program it compares every op on ``toy`` with the CPU's reference. PyTorch takes one such device per process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import rewardops
from rewardops.testing.calls import LAYOUTS, calls, make_batch


class Toy(Tensor):
    """A tensor of the device, which holds its numbers in ``data_on_cpu``."""

    data_on_cpu: Tensor

    @staticmethod
    def of(data: Tensor) -> Toy:
        if data.dtype is torch.float64:
            raise TypeError("toy tensors cannot be float64")
        out = Tensor._make_wrapper_subclass(
            Toy, data.shape, data.stride(), data.storage_offset(), dtype=data.dtype, device="toy:0"
        )
        out.data_on_cpu = data
        return out

    def __len__(self) -> int:
        return self.shape[0]

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "rewardops":
            return op.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.PrivateUse1), *args)
        return _on_cpu(op, *args, **(kwargs or {}))


def _inside(value: Any) -> Any:
    if isinstance(value, Toy):
        return value.data_on_cpu
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _outside(value: Any) -> Any:
    return Toy.of(value) if isinstance(value, Tensor) else value


def _on_cpu(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an op of torch on the tensors inside; results are on the device unless they are copied from it."""
    device = kwargs.get("device")
    out = op(*tree_map(_inside, args), **tree_map(_inside, kwargs))
    if device is not None and torch.device(device).type == "cpu":
        return out
    for argument, described in zip(args, op._schema.arguments, strict=False):
        if described.alias_info is not None and described.alias_info.is_write:
            return argument
    return tree_map(_outside, out)


def _arange(*numbers: int, device: Any = None, dtype: Any = None, **_: Any) -> Toy:
    """PyTorch's own resizes an empty tensor, which a wrapper cannot do."""
    return Toy.of(torch.arange(*numbers, dtype=dtype, device="cpu"))


def register() -> None:
    _setup_privateuseone_for_python_backend("toy")
    # Tensors made on the device, and moved to it.
    _libraries[0].fallback(_on_cpu, dispatch_key="PrivateUse1")
    for name in ("arange", "arange.start", "arange.start_step"):
        _libraries[1].impl(name, _arange, "PrivateUse1")


_libraries = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")


# ---- the comparison ----------------------------------------------------------------------------------------


# The device has no generators, and its tensors no addresses, from which a write over an input is judged.
LEFT_OUT = ("clip_cov_mask", "token_stats_and_grad in place")


def _results(call: Any) -> list[Tensor]:
    """Outputs and gradients, on the CPU."""
    inputs = [x.detach().requires_grad_(call.differentiable) for x in call.inputs]
    outputs = [t for t in tree_leaves(call.fn(*inputs)) if isinstance(t, Tensor)]
    if not call.differentiable:
        return [t.cpu() for t in outputs]
    smooth = [t for t in outputs if t.requires_grad]
    grads = torch.autograd.grad([t.sum() for t in smooth], inputs, allow_unused=True)
    return [t.detach().cpu() for t in (*outputs, *grads) if t is not None]


def compare(layout: str) -> Iterator[str]:
    """The calls that differ between the devices, with the reason."""
    batch = make_batch(layout=layout, dtype=torch.float32)
    for ours, wanted in zip(calls(batch.to("toy")), calls(batch), strict=True):
        if ours.name in LEFT_OUT:
            continue
        try:
            with rewardops.use_backend("reference"):
                want = _results(wanted)
            for a, b in zip(_results(ours), want, strict=True):
                torch.testing.assert_close(a.data, b, rtol=2e-4, atol=2e-5, equal_nan=True)
        except Exception as error:
            yield f"{ours.name} ({layout}): {type(error).__name__}: {str(error).splitlines()[0]}"


if __name__ == "__main__":
    register()
    failures = [failure for layout in LAYOUTS for failure in compare(layout)]
    print("\n".join(failures))
    raise SystemExit(len(failures) > 0)
