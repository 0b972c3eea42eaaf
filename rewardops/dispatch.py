"""Dispatch: one schema per op, its fake and its gradient, and which backend serves it on a device.

An op is defined once with :func:`define`; its implementations are the functions of the same name in
``rewardops.reference.<family>``, ``rewardops.cpp.<family>`` and ``rewardops.triton_kernels.<family>``.
Backward passes are ops too. Backends are looked up when an op runs, so a compiled graph follows
:func:`use_backend` as eager code does.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.util
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

BACKENDS = ("reference", "cpp", "triton")

_PACKAGES = {
    "reference": "rewardops.reference",
    "cpp": "rewardops.cpp",
    "triton": "rewardops.triton_kernels",
}
# First that can serve wins. Process-wide and not per thread: backward passes run on threads of autograd's.
_ORDER = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}

_library = torch.library.Library("rewardops", "DEF")
_forced: str | None = None


class BackendUnavailable(RuntimeError):
    """The backend asked for cannot serve this op on this device."""


def _check_name(name: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"backend: got {name!r}, want one of {', '.join(repr(b) for b in BACKENDS)}")
    return name


if os.environ.get("REWARDOPS_BACKEND"):
    _forced = _check_name(os.environ["REWARDOPS_BACKEND"])


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every op by one backend (``"reference"``, ``"cpp"`` or ``"triton"``) while the context is open.

    Process-wide, and looked up when an op runs: a backward pass called after the context has closed is
    served by the default again. None restores the default order. An op that the backend cannot serve
    raises :class:`BackendUnavailable`. ``REWARDOPS_BACKEND`` sets the same from the environment.
    """
    global _forced
    before, _forced = _forced, None if name is None else _check_name(name)
    try:
        yield
    finally:
        _forced = before


def _torch_openmp() -> int:
    """The address of ``GOMP_parallel`` in the OpenMP runtime that torch brings; 0 where there is none."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    try:
        with open("/proc/self/maps") as maps:
            loaded = {line.split()[-1] for line in maps if "libgomp" in line}
        for path in loaded:
            if os.path.dirname(path) in (folder, folder.replace("/torch/lib", "/torch.libs")):
                library = ctypes.CDLL(path, mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
                return ctypes.cast(library.GOMP_parallel, ctypes.c_void_p).value or 0
    except (OSError, AttributeError):
        pass
    return 0


@functools.cache
def compiled_module() -> types.ModuleType | None:
    """The C++ module, or None where it was not built. Its loops run on torch's threads."""
    try:
        module = importlib.import_module("rewardops._C")
    except ImportError:
        return None
    module.use_team(_torch_openmp())
    return module


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    """Whether Triton kernels run on the CPU, by the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def unavailable(backend: str, device_type: str) -> str | None:
    """Why a backend cannot serve tensors on a device; None where it can."""
    if backend == "reference":
        return None
    if backend == "cpp":
        if device_type != "cpu":
            return f"it serves CPU tensors, not {device_type}"
        if compiled_module() is None:
            return "the compiled module rewardops._C is missing (install rewardops with a C++ compiler)"
        return None
    if not has_triton():
        return "the package triton is not installed"
    if device_type == "cpu" and not triton_interprets():
        return "it serves GPU tensors; on the CPU only by the interpreter (TRITON_INTERPRET=1)"
    return None


def backend_for(device_type: str) -> str:
    """The backend that serves an op on a device."""
    if _forced is not None:
        why = unavailable(_forced, device_type)
        if why is not None:
            raise BackendUnavailable(f"backend {_forced!r} cannot serve {device_type} tensors: {why}")
        return _forced
    for name in _ORDER.get(device_type, ("reference",)):
        if unavailable(name, device_type) is None:
            return name
    return "reference"


@functools.cache
def _implementation(backend: str, family: str, op: str) -> Callable[..., Any]:
    module = importlib.import_module(f"{_PACKAGES[backend]}.{family}")
    return getattr(module, op)


def define(
    family: str,
    schema: str,
    *,
    fake: Callable[..., Any],
    setup_context: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define ``rewardops::<op>`` with its fake and, where it is differentiable, its gradient; return it."""
    op = schema.partition("(")[0]
    # Exact strides: a compiled graph must hand over rows as they lie, and not as copies in another layout.
    _library.define(schema, tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag))

    def on_cpu(*args: Any) -> Any:
        return _implementation(backend_for("cpu"), family, op)(*args)

    def on_cuda(*args: Any) -> Any:
        # Kernels are launched on the current device, which need not be the tensors'.
        with torch.cuda.device(next(a.device for a in args if isinstance(a, torch.Tensor))):
            return _implementation(backend_for("cuda"), family, op)(*args)

    _library.impl(op, on_cpu, "CPU")
    _library.impl(op, on_cuda, "CUDA")
    torch.library.register_fake(f"rewardops::{op}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(
            f"rewardops::{op}", backward, setup_context=setup_context, lib=_library
        )
    return getattr(torch.ops.rewardops, op).default


def config() -> dict[str, str]:
    """What is installed and what serves each device, as text."""
    lines: dict[str, str] = {"torch": str(torch.__version__)}
    module = compiled_module()
    lines["cpp"] = (
        f"built, running the {module.isa()} kernels"
        if module is not None
        else "not built: CPU ops run on the reference"
    )
    lines["cuda kernels"] = "none in this version"
    if has_triton():
        lines["triton"] = importlib.import_module("triton").__version__
        if triton_interprets():
            lines["triton"] += ", interpreted on the CPU"
    else:
        lines["triton"] = "not installed"
    lines["forced backend"] = _forced or "none"
    for device_type in _ORDER:
        try:
            lines[f"{device_type} ops"] = backend_for(device_type)
        except BackendUnavailable as error:
            lines[f"{device_type} ops"] = str(error)
    lines["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return lines


def show_config() -> str:
    """A line for each backend and device: what is installed, and what serves an op. Also printed."""
    text = "\n".join(f"{key:>14}: {value}" for key, value in config().items())
    print(text)
    return text
