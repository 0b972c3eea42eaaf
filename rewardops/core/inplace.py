"""What may be written over: layouts and addresses, known to the host, tell which tensors share memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor


def _may_meet(dims: Iterable[tuple[int, int]]) -> bool:
    """False if no two places of a lattice coincide; dimensions are ``(stride, size)``.

    From the smallest stride on, each must step beyond all that the smaller ones reach. A layout that is free of
    overlaps in another way is called overlapping.
    """
    reach = 0
    for stride, size in sorted(dims):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def overlaps_itself(tensor: Tensor) -> bool:
    """False if every element has memory of its own: not the rows of ``expand``, nor windows that overlap."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    return _may_meet(zip(tensor.stride(), tensor.shape, strict=True))


def _span(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the first byte of a tensor to the one after its last."""
    start, size = tensor.data_ptr(), tensor.element_size()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return start, start + (last + 1) * size


def share_memory(a: Tensor, b: Tensor) -> bool:
    """False if no byte belongs to both tensors. Rows of the two in turn, as of ``stack``, are told apart."""
    if a.is_meta or b.is_meta or a.device != b.device or not a.numel() or not b.numel():
        return False
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    if not a_start or not b_start:  # memory that does not show its address
        return True
    if a_end <= b_start or b_end <= a_start:
        return False
    size, layout = a.element_size(), (a.shape, a.stride())
    apart, rest = divmod(abs(b_start - a_start), size)
    if rest or b.element_size() != size or (b.shape, b.stride()) != layout:
        return True
    return _may_meet([(apart, 2), *zip(a.stride(), a.shape, strict=True)])


def obstacle(target: Tensor, name: str, others: Mapping[str, Tensor | None]) -> str | None:
    """What would be mixed up if ``target`` were written over while ``others`` are read; None for nothing."""
    if overlaps_itself(target):
        return f"{name} whose rows share memory"
    for other, tensor in others.items():
        if tensor is not None and share_memory(target, tensor):
            return f"{other} in the memory of {name}"
    return None


def check_overwritable(target: Tensor, name: str, others: Mapping[str, Tensor | None]) -> None:
    """Raise where :func:`obstacle` finds one."""
    if why := obstacle(target, name, others):
        raise ValueError(f"inplace: got True with {why}, want False or a copy of {name}")


def physical(tensor: Tensor) -> Tensor:
    """The tensor in memory behind one of ``torch.func`` and ``torch.vmap``, with their dimensions."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def in_memory(*tensors: Tensor | None) -> bool:
    """True if no tensor is traced, or stands for many (``vmap``, ``is_grads_batched``)."""
    return all(
        t is None or (torch._C._has_storage(t) and not isinstance(t, torch._subclasses.FakeTensor))
        for t in tensors
    )


def backward_may_overwrite(*tensors: Tensor | None) -> bool:
    """True where a backward pass with these tensors runs once, on memory: not recorded, batched or traced."""
    return not (
        torch.is_grad_enabled()
        or torch._C._are_functorch_transforms_active()
        or torch.compiler.is_compiling()
    ) and in_memory(*tensors)
