"""An op under PyTorch's transformations: its gradient, also in ``torch.func``, and ``torch.vmap``.

``torch.library.register_autograd`` supports autograd alone: ``torch.func`` rejects its ops, and an op without a
gradient, such as a backward pass, ends the graph silently, so that second derivatives come out as zeros.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.nn import Parameter
from torch.utils._pytree import tree_flatten, tree_unflatten

from .scalars import Floats


def in_func(tensor: Tensor) -> bool:
    """True if the tensor is wrapped by ``torch.func``; it may then stand for many values."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def may_require_grad(tensor: Tensor) -> bool:
    """True if a gradient may be required; always for a tensor in vmap, which does not show it."""
    if torch.compiler.is_compiling():
        return torch.is_grad_enabled() and tensor.requires_grad
    return torch.is_grad_enabled() and (tensor.requires_grad or in_func(tensor))


def may_overwrite_saved() -> bool:
    """True if saved tensors may be modified in place.

    Version counters catch other readers, except behind saved-tensor hooks (checkpointing, offloading).
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is None


# The length of each argument that is a list of tensors, None for another argument; None if no argument can be one.
Sizes = Sequence[int | None] | None


def _sizes(args: Iterable[Any]) -> list[int | None]:
    return [len(a) if isinstance(a, list) and any(isinstance(t, Tensor) for t in a) else None for a in args]


def _flat(values: Sequence[Any], sizes: Sizes) -> Sequence[Any]:
    """Flatten lists of tensors among the values."""
    if sizes is None:
        return values
    return list(chain.from_iterable([v] if n is None else v for v, n in zip(values, sizes, strict=True)))


def _nested(flat: Sequence[Any], sizes: Sizes) -> Sequence[Any]:
    """The inverse of :func:`_flat`."""
    if sizes is None:
        return flat
    items = iter(flat)
    return [next(items) if n is None else list(islice(items, n)) for n in sizes]


def _flat_gradients(grads: Sequence[Any], sizes: Sizes) -> Sequence[Any]:
    """The gradients of arguments, None for each tensor of a list that has none."""
    if sizes is None:
        return grads
    return _flat(
        [[None] * n if n is not None and g is None else g for g, n in zip(grads, sizes, strict=True)], sizes
    )


def _save_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.set_materialize_grads(False)


def second_derivative(op: str) -> str:
    """Error message for a second derivative."""
    return f"rewardops::{op}: a second derivative was asked for, but it is differentiable once"


def _no_gradient(op: str) -> Callable[..., Any]:
    name = op.rstrip("_")
    why = f"rewardops::{op}: a gradient was asked for, but it is not differentiable"
    if name.endswith("_backward"):
        why = second_derivative(name.removesuffix("_backward"))

    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(why)

    return backward


def autograd_kernel(
    op: torch._ops.OpOverload,
    pack: Callable[[Sequence[Any]], Sequence[Any]],
    floats: Floats,
    setup_context: Callable[..., None] | None,
    backward: Callable[..., Any] | None,
) -> Callable[..., Any]:
    """The op's kernel for the Autograd dispatch key: it records the gradient, or an error for an op without one.

    ``pack`` gathers the arguments of the family's record, and ``floats`` knows the op's numbers. ``setup_context``
    and ``backward`` are described in :func:`.dispatch.define`; for a list of tensors, ``grads`` is a list as well.
    """
    name = op._schema.name.partition("::")[2]
    setup_context = setup_context or _save_nothing
    backward = backward or _no_gradient(name)
    names = [argument.name for argument in op._schema.arguments]
    takes_lists = any(re.match(r"List\[.*Tensor", str(a.type)) for a in op._schema.arguments)
    makes_list = [str(r.type) for r in op._schema.returns] == ["List[Tensor]"]

    # Looked up once: every call of an op comes here.
    redispatch, guard, after_autograd = (
        op.redispatch,
        torch._C._AutoDispatchBelowAutograd,
        torch._C._after_autograd_keyset,
    )
    any_requires_grad = torch._C._any_requires_grad

    def below(keyset: torch._C.DispatchKeySet, args: Iterable[Any]) -> Any:
        with guard():
            return redispatch(keyset & after_autograd, *args)

    def forward(ctx: Any, keyset: torch._C.DispatchKeySet, sizes: Sizes, *flat: Any) -> Any:
        args = _nested(flat, sizes)
        output = below(keyset, args)
        ctx.sizes = sizes
        setup_context(ctx, pack(floats.carried(args)), output)
        return output if isinstance(output, Tensor) else tuple(output)

    def gradient(ctx: Any, *grads: Any) -> Any:
        needs = ctx.needs_input_grad
        flags = _nested(needs[2:], ctx.sizes)
        ctx.needs_input_grad = pack(flags[: len(floats.names)])
        try:
            by_name = backward(ctx, list(grads)) if makes_list else backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needs
        of_arguments = [by_name.get(name) for name in names[: len(flags)]]
        return None, None, *_flat_gradients(of_arguments, ctx.sizes)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(
            f"rewardops::{name}: a forward-mode derivative was asked for, but it has reverse mode only"
        )

    methods: dict[str, Callable[..., Any]] = {
        "forward": forward,
        "backward": gradient,
        "jvp": jvp,
        "_compiled_autograd_key": torch.autograd.Function._compiled_autograd_key,
    }
    # In torch.func the dispatcher runs the kernel once per level, and `below` continues with the next one. A plain
    # autograd.Function would start again at the first.
    function: Any = type(
        f"rewardops_{name}", (_SingleLevelFunction,), {k: staticmethod(f) for k, f in methods.items()}
    )

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        reverse = torch.is_grad_enabled() and any_requires_grad(*args)
        if not reverse and forward_ad._current_level < 0:
            return below(keyset, args)
        sizes = _sizes(args) if takes_lists else None
        func = torch._C._are_functorch_transforms_active()
        with enable_single_level_autograd_function() if func else contextlib.nullcontext():
            output = function.apply(keyset, sizes, *_flat(args, sizes))
        return list(output) if makes_list else output

    return kernel


_compiling, _tracing = torch.compiler.is_compiling, torch._C._get_tracing_state
_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _profiled = torch._C._are_functorch_transforms_active, torch._C._autograd._profiler_enabled


def undisturbed() -> bool:
    """True in plain eager mode: no compiler, tracer, mode, profiler, transformation or forward-mode derivative."""
    return not (
        _compiling() or _modes() or _function_modes() or _transforms() or _profiled()
        or forward_ad._current_level >= 0 or _tracing() is not None
    )  # fmt: skip


def shortcut(
    call: Callable[..., Any], schema: torch.FunctionSchema, kernels: Mapping[str, Callable[..., Any]]
) -> Callable[..., Any]:
    """The op as a function that calls the kernel of the tensors' device where nothing else would take part.

    The dispatcher comes to the same kernel, by way of the one for Autograd, each time converting all arguments:
    most of the time of a small call. ``call`` goes there wherever a gradient, a mode, a transformation, a subclass,
    a profiler or a tracer could have a say, or a number is not a float; and so do ops that write to their
    arguments, whose versions the dispatcher counts.
    """
    if any(a.alias_info is not None and a.alias_info.is_write for a in schema.arguments):
        return call
    arguments = [(k, str(a.type)) for k, a in enumerate(schema.arguments) if a.name != "numbers"]
    count = len(arguments)
    tensors = [k for k, kind in arguments if kind in ("Tensor", "Optional[Tensor]")]
    lists = [k for k, kind in arguments if "List[" in kind and "Tensor" in kind]
    floats = [k for k, kind in arguments if kind == "float"]
    makes_list = [str(r.type) for r in schema.returns] == ["List[Tensor]"]
    grad_enabled, strided = torch.is_grad_enabled, torch.strided

    def kernel_for(args: Sequence[Any]) -> Callable[..., Any] | None:
        """The kernel of the device of all tensors; None if the dispatcher decides."""
        if len(args) != count or not undisturbed():
            return None
        for k in floats:
            if type(args[k]) is not float:
                return None
        given = [args[k] for k in tensors]
        for k in lists:
            given += args[k]
        with_grad, device = grad_enabled(), ""
        for t in given:
            if t is None:
                continue
            kind = type(t)
            if (
                (kind is not Tensor and kind is not Parameter) or (with_grad and t.requires_grad)
                or t.layout is not strided or t.is_neg()
            ):  # fmt: skip
                return None
            here = "cpu" if t.is_cpu else "cuda" if t.is_cuda else "other"
            if device != here:
                if device:
                    return None
                device = here
        return kernels.get(device)

    def directly(*args: Any) -> Any:
        kernel = kernel_for(args)
        if kernel is None:
            return call(*args)
        output = kernel(*args)
        return output if isinstance(output, Tensor) else list(output) if makes_list else tuple(output)

    return directly


def vmap_rule(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """Batching rule: run the op slice by slice. Valid for every op, as output shapes follow from input shapes."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise ValueError(f"vmap over {op}: got a dimension of size 0, want at least 1")
        flat, spec = tree_flatten(args)
        inputs = list(zip(flat, tree_flatten(in_dims)[0], strict=True))

        outputs = []
        for k in range(info.batch_size):
            slices = [x if dim is None else x.select(dim, k) for x, dim in inputs]
            outputs.append(tree_flatten(op(*tree_unflatten(slices, spec))))
        stacked = [torch.stack(parts) for parts in zip(*(flat for flat, _ in outputs), strict=True)]
        like = outputs[0][1]
        return tree_unflatten(stacked, like), tree_unflatten([0] * len(stacked), like)

    return rule
