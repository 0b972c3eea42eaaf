"""What ops must not depend on, the default dtype and device of the process; and meta tensors."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import rewardops
from rewardops.core import dispatch
from rewardops.core.families import FAMILIES
from rewardops.testing import calls, same_bits

# Triton's kernels see tensors alone: by the interpreter a few ops suffice.
FEW = (
    "token_stats",
    "linear_token_stats",
    "group_advantages on tokens",
    "gae",
    "segment_reduce",
    "prefix_values",
)


def run(call: calls.Call, backend: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Outputs and gradients; every tensor that is made here is made like another."""
    leaves = [x.detach().clone().requires_grad_() for x in call.inputs]
    with dispatch.use_backend(backend):
        outputs = tensors(call.fn(*leaves))
        smooth = [o for o in outputs if o.requires_grad]
        ups = [torch.ones_like(o) for o in smooth]
        grads = torch.autograd.grad(smooth, leaves, ups, allow_unused=True) if smooth else ()
    return [o.detach() for o in outputs], [g for g in grads if g is not None]


def tensors(result) -> list[torch.Tensor]:
    return [o for o in ([result] if isinstance(result, torch.Tensor) else result) if o is not None]


def chosen(family: str, layout: str, backend: str) -> list[calls.Call]:
    batch_calls = calls.calls(calls.make_batch(layout=layout, dtype=torch.float32), family)
    return [c for c in batch_calls if backend != "triton" or c.name in FEW]


@pytest.fixture(params=["bfloat16", "float16", "float64", "meta"])
def default(request):
    """Another default dtype or device while the test runs a call."""

    def held(fn):
        if request.param == "meta":
            with torch.device("meta"):
                return fn()
        torch.set_default_dtype(getattr(torch, request.param))
        try:
            return fn()
        finally:
            torch.set_default_dtype(torch.float32)

    return held


@pytest.mark.parametrize("layout", calls.LAYOUTS)
@pytest.mark.parametrize("backend", ["reference", "cpp", "triton"])
@pytest.mark.parametrize("family", FAMILIES)
def test_results_do_not_depend_on_defaults(default, family, backend, layout):
    """The same bits, forward and backward."""
    if backend == "triton" and (importlib.util.find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("by the interpreter")
    if why := dispatch.unavailable(backend, "cpu"):
        pytest.skip(why)
    for call in chosen(family, layout, backend):
        want, got = run(call, backend), default(lambda call=call: run(call, backend))
        assert same_bits(want, got), call.name


@pytest.mark.parametrize("layout", calls.LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_meta_tensors(family, layout):
    """Shapes and dtypes of every call, without memory for its tensors."""
    batch = calls.make_batch(layout=layout, dtype=torch.float32)
    on_meta = batch.to("meta")
    for call, meta in zip(calls.calls(batch, family), calls.calls(on_meta, family), strict=True):
        if call.op == "clip_cov_mask":  # meta has no generators
            assert rewardops.clip_cov_mask(on_meta.values, **on_meta.rows).is_meta
            continue
        want, got = (tensors(c.fn(*c.inputs)) for c in (call, meta))
        assert [(x.shape, x.dtype) for x in got] == [(x.shape, x.dtype) for x in want], call.name
        assert all(x.is_meta for x in got), call.name
