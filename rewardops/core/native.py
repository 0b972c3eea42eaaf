"""The compiled modules and Triton: where they are found, and whether they can be used."""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import types

import torch
from torch import Tensor


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


# Loaded at import, so that its fork handlers are registered before any fork: see csrc/cpu/parallel.cpp.
compiled_module()


_HUGE = 2**23  # bytes from which huge pages pay off; as in csrc/cpu/pages.cpp


def fresh(shape: torch.Size | tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Uninitialised CPU memory for an output of any size, in huge pages where the system has them."""
    return _in_huge_pages(torch.empty(shape, dtype=dtype, device="cpu"))


def fresh_like(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """As :func:`fresh`, of the shape of another tensor, and of its dtype unless another is given."""
    return _in_huge_pages(torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format))


def _in_huge_pages(out: Tensor) -> Tensor:
    if (size := out.nbytes) >= _HUGE and (module := compiled_module()) is not None:
        module.prefer_huge_pages(out.data_ptr(), size)
    return out


def cuda_module() -> types.ModuleType | None:
    """The CUDA C++ kernels of the compiled module, or those that ``REWARDOPS_CUDA_ON_HOST`` names.

    The latter run on CPUs: a build by ``tests/cuda_on_host``, for tests of kernels where there is no GPU.
    """
    path = cuda_on_host()
    return getattr(compiled_module(), "cuda", None) if path is None else _module_at(path)


@functools.cache
def _module_at(path: str) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_on_host", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda_on_host() -> str | None:
    """Path of a build of the CUDA C++ kernels for CPUs, from the environment; None otherwise."""
    return os.environ.get("REWARDOPS_CUDA_ON_HOST") or None


@functools.cache
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interprets() -> bool:
    """True if Triton kernels run on the CPU, by the interpreter."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
