"""Dispatch: one schema per op, its fake and its gradient, and which backend serves it on a device.

An op is defined once with :func:`define`; its implementations are the functions of the same name in
``rewardops.reference.<family>``, ``rewardops.cpp.<family>``, ``rewardops.triton_kernels.<family>`` and, for the few
ops where a kernel in CUDA C++ has a reason, ``rewardops.cuda.<family>``. Backward passes are ops too. Backends are
looked up when an op runs, so a compiled graph follows :func:`use_backend` as eager code does.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .kinds import Kind, checker, kinds_of
from .native import compiled_module, cuda_module, cuda_on_host, has_triton, triton_interprets
from .precision import InFloat32, autocast_enabled, has_float64
from .records import packer
from .scalars import Floats, with_numbers
from .settings import ContextSetting
from .transforms import autograd_kernel, shortcut, vmap_rule

BACKENDS = ("reference", "cpp", "triton", "cuda")

_PACKAGES = {
    "reference": "rewardops.reference",
    "cpp": "rewardops.cpp",
    "triton": "rewardops.triton_kernels",
    "cuda": "rewardops.cuda",
}
# The first available backend serves. CUDA C++ is chosen by name: no kernel of it is measured ahead of Triton's yet.
_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}

_library = torch.library.Library("rewardops", "DEF")


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve this op on this device; the message says why.

    Example:
        >>> issubclass(ro.BackendUnavailable, RuntimeError)
        True
    """


def _names(text: str | None) -> tuple[str, ...]:
    names = tuple(name.strip() for name in (text or "").split(",") if name.strip())
    for name in names:
        if name not in BACKENDS:
            raise ValueError(f"backend: got {name!r}, want one of {', '.join(repr(b) for b in BACKENDS)}")
    return names


_forced = ContextSetting(_names(os.environ.get("REWARDOPS_BACKEND")))


def use_backend(name: str | None) -> contextlib.AbstractContextManager[None]:
    """Serve every op by one backend (``reference``, ``cpp``, ``triton`` or ``cuda``) while the context is open.

    Several names separated by commas are tried in that order: ``"cuda,triton"`` takes the CUDA C++ kernels where
    there are any, and Triton elsewhere. An op that none of them can serve raises :class:`BackendUnavailable`.

    Process-wide, on every thread, and looked up when an op runs: a backward pass called after the context has
    closed is served by the default again. Of contexts that are open on several threads, the one opened last
    holds. None restores the default order. ``REWARDOPS_BACKEND`` sets the same from the environment.

    Args:
        name: one name, or several separated by commas; None for the default order.

    Returns:
        A context manager; the choice holds while it is open.

    Raises:
        ValueError: an unknown name.

    Example:
        >>> with ro.use_backend("reference"):
        ...     ro.row_sum(torch.ones(1, 3)).tolist()
        [3.0]
    """
    return _forced.use(_names(name))


def unavailable(
    backend: str, device_type: str, family: str | None = None, op: str | None = None
) -> str | None:
    """The reason why a backend cannot serve a device (or an op on it); None if it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"it serves CPU tensors, not {device_type}"
        if compiled_module() is None:
            return "the compiled module rewardops._C is missing (install rewardops with a C++ compiler)"
        return None
    if backend == "triton":
        if not has_triton():
            return "the package triton is not installed"
        if device_type == "cpu" and not triton_interprets():
            return "it serves GPU tensors; on the CPU only by the interpreter (TRITON_INTERPRET=1)"
        return None
    if device_type != ("cuda" if cuda_on_host() is None else "cpu"):
        return (
            "it serves GPU tensors; on the CPU only a build of its kernels for tests (REWARDOPS_CUDA_ON_HOST)"
        )
    if cuda_module() is None:
        return "the CUDA C++ kernels are missing (install rewardops with REWARDOPS_CUDA=1 and nvcc)"
    if family is not None and op is not None and _implementation(backend, family, op) is None:
        return "it has no kernel for it"
    return None


def backend_for(device_type: str, family: str | None = None, op: str | None = None) -> str:
    """The backend that serves an op on a device."""
    forced = _forced.value
    for name in forced or _ORDER.get(device_type, ("reference",)):
        why = unavailable(name, device_type, family, op)
        if why is None:
            return name
    if not forced:
        return "reference"
    served = f"{op} for {device_type} tensors" if op else f"{device_type} tensors"
    raise BackendUnavailable(f"backend {','.join(forced)!r} cannot serve {served}: {why}")


@functools.cache
def _implementation(backend: str, family: str, op: str) -> Callable[..., Any] | None:
    package = _PACKAGES[backend]
    if backend == "cuda" and importlib.util.find_spec(f"{package}.{family}") is None:
        return None
    return getattr(importlib.import_module(f"{package}.{family}"), op, None)


def _run(device_type: str, family: str, op: str, args: Sequence[Any]) -> Any:
    implementation = _implementation(backend_for(device_type, family, op), family, op)
    assert implementation is not None, op
    if autocast_enabled(device_type):
        # Kernels choose their own precision.
        with torch.autocast(device_type, enabled=False):
            return implementation(*args)
    return implementation(*args)


def _device(args: Sequence[Any]) -> torch.device:
    return next(a.device for a in args if isinstance(a, torch.Tensor))


def define(
    family: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    record: type[NamedTuple] | None = None,
    tensors: Mapping[str, Any] | None = None,
    check: Callable[..., None] | None = None,
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``rewardops::<op>`` with its fake and, where it is differentiable, its gradient; return it.

    Args:
        record: the family's argument record, whose fields stand side by side in the schema
            (:func:`.records.schema_of`). Backends, ``fake`` and ``setup_context`` receive them as one record.
        tensors: the kinds of the tensors that are not fields of the record (:mod:`.kinds`).
        check: called with the op's arguments, as backends are, before any of them; it raises where they do not fit
            together in a way that no kind says.
        setup_context: ``(ctx, inputs, output)``, as ``torch.library.register_autograd`` takes it.
        backward: ``(ctx, *grads)``; returns a gradient for each name of an argument, a dict, without those that
            have none. ``ctx.needs_input_grad`` has a flag per argument, those of the record in one record.
    """
    op = schema.partition("(")[0]
    # Exact strides: a compiled graph must pass strided rows as they are, not copies in another layout.
    tags = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)
    _library.define(with_numbers(schema), tags=tags)
    overload = getattr(torch.ops.rewardops, op).default
    floats = Floats(overload._schema)
    pack = packer(floats.names, record)
    others = {name: kind for name, hint in (tensors or {}).items() if (kind := Kind.of(hint)) is not None}
    check_kinds = checker(overload._schema, {**kinds_of(record), **others})

    def checked(given: Sequence[Any], on_cpu: bool = False) -> Sequence[Any]:
        """The arguments of a backend."""
        args = floats.read(given)
        check_kinds(args, on_cpu)
        packed = pack(args)
        if check is not None:
            check(*packed)
        return packed

    def on_cpu(*given: Any) -> Any:
        return _run("cpu", family, op, checked(given, on_cpu=True))

    def on_cuda(*given: Any) -> Any:
        args = checked(given)
        # Kernels are launched on the current device, which need not be the tensors'.
        with torch.cuda.device(_device(given)):
            return _run("cuda", family, op, args)

    def elsewhere(*given: Any) -> Any:
        args, device = checked(given), _device(given)
        with contextlib.nullcontext() if has_float64(device.type) else InFloat32():
            return _run(device.type, family, op, args)

    _library.impl(op, on_cpu, "CPU")
    _library.impl(op, on_cuda, "CUDA")
    _library.impl(op, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"rewardops::{op}", lambda *args: fake(*pack(floats.carried(args))), lib=_library
    )
    kernel = autograd_kernel(overload, pack, floats, setup_context, backward)
    _library.impl(op, kernel, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"rewardops::{op}", vmap_rule(overload), lib=_library)
    return shortcut(floats.caller(overload), overload._schema, {"cpu": on_cpu, "cuda": on_cuda})


def config() -> dict[str, str]:
    """Installed components and the backend of each device, as text."""
    lines: dict[str, str] = {"torch": str(torch.__version__)}
    module = compiled_module()
    lines["cpp"] = (
        f"built, running the {module.isa()} kernels"
        if module is not None
        else "not built: CPU ops run on the reference"
    )
    why = unavailable("cuda", "cuda")
    lines["cuda kernels"] = "built; chosen by name" if why is None else f"not available: {why}"
    if has_triton():
        lines["triton"] = importlib.import_module("triton").__version__
        if triton_interprets():
            lines["triton"] += ", interpreted on the CPU"
    else:
        lines["triton"] = "not installed"
    lines["forced backend"] = ",".join(_forced.value) or "none"
    for device_type in _ORDER:
        try:
            lines[f"{device_type} ops"] = backend_for(device_type)
        except BackendUnavailable as error:
            lines[f"{device_type} ops"] = str(error)
    lines["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return lines


def show_config() -> str:
    """Print and return a line per backend and device: what is installed, and which backend serves it.

    Returns:
        The text that was printed.

    Example:
        >>> text = ro.show_config()  # doctest: +ELLIPSIS
                 torch: ...
        >>> "cpu ops" in text
        True
    """
    text = "\n".join(f"{key:>14}: {value}" for key, value in config().items())
    print(text)
    return text
