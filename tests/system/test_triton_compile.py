"""Triton kernels compile for every target without a GPU, do not spill, and load 16 bytes at a time.

The launches to compile are recorded from the real callers: kernels are replaced by recorders, the ops are called on
CPU tensors, and every distinct launch is compiled ahead of time as the just-in-time compiler would specialise it.
That happens in processes of their own, because in this one the kernels are interpreted.
"""

from __future__ import annotations

import importlib
import itertools
import json
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
if os.environ.get("REWARDOPS_THOROUGH", "0") not in ("", "0"):
    TARGETS |= {"sm_80": ("cuda", 80, 32), "sm_100": ("cuda", 100, 32)}


# ---- in the processes that compile -------------------------------------------------------------------------


def recorder() -> list:
    """Replaces every kernel by a recorder; the list that fills with (kernel, arguments, keywords)."""
    from triton.runtime.jit import JITFunction

    from rewardops import triton_kernels

    launches = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            return lambda *args, **kwargs: launches.append((self.kernel, args, kwargs))

    for module_info in pkgutil.iter_modules(triton_kernels.__path__):
        module = importlib.import_module(f"{triton_kernels.__name__}.{module_info.name}")
        for name, value in vars(module).copy().items():
            if isinstance(value, JITFunction) and ("kernel" in name or "combine" in name):
                setattr(module, name, Recorder(value))
    return launches


def record() -> list:
    """Every distinct launch that the callers make."""
    import torch
    from rewardops.triton_kernels import (
        advantages,
        entropy,
        kl,
        logits,
        prefix_tree,
        returns,
        segments,
        selection,
        td,
        tree,
    )  # fmt: skip

    from rewardops.logits import OUTPUTS
    from rewardops.reference.segments import REDUCTIONS
    from rewardops.tree import REDUCES

    launches = recorder()
    vocab, batch, width = 151936, 8, 4096
    ids = torch.zeros(40, dtype=torch.int64)
    policy = OUTPUTS[:7]
    both = (*policy, "ref_logprob", "kl", "reverse_kl")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(40, vocab, dtype=dtype)

        def run(outputs, rows=40, ref=False, mask=None, temperatures=None, softcap=0.0, x=x):
            inputs = (x[:rows], ids[:rows], x[:rows] if ref else None, mask, temperatures)
            saved, *made = logits.token_stats(*inputs, 0.7, softcap, vocab, 0.3, outputs, False)
            grads = [None if name == "is_top1" else g for name, g in zip(outputs, made, strict=True)]
            rest = (saved, 0.7, softcap, vocab, 0.3, outputs)
            logits.token_stats_backward(grads, *inputs, *rest, True, ref)

        for rows, mask in ((40, None), (40, torch.ones(40).bool()), (2, None)):
            run(("logprob", "entropy"), rows, mask=mask)
            run(("logprob",), rows, mask=mask)
            run(("logprob", "entropy", "kl"), rows, ref=True)
        run(policy)
        run((*both, "jsd"), ref=True)
        run(("logprob", "entropy"), softcap=30.0, temperatures=torch.ones(40, dtype=torch.float64))
        run((*both, "jsd"), ref=True, softcap=30.0, temperatures=torch.ones(40, dtype=torch.float64))
        for outputs, ref in ((("logprob", "entropy"), None), (both, x)):
            inputs = (x, ids, ref, None, None, 0.7, 0.0, 0, vocab)
            record = logits.token_stats_partial(*inputs, outputs)
            logits.token_stats_partial_backward(record, record, *inputs, True, ref is not None)

    mask = torch.ones(batch, width).bool()
    cu = torch.arange(0, batch * width + 1, width, dtype=torch.int32)
    groups, rewards = torch.arange(batch) // 4, torch.zeros(batch)
    for values, m, offsets in (
        (torch.zeros(batch, width), mask, None),
        (torch.zeros(batch * width), None, cu),
    ):
        for estimator in kl.ESTIMATORS:
            how = (estimator, 20.0, float("inf"), 0.1, True)
            kl.token_kl(values, values, m, values if estimator == "k3" else None, None, *how)
            kl.token_kl_backward(values, values, values, m, None, *how, True, True)
        n = values.numel() if m is None else -1
        relative = [("mean", "std"), ("leave_one_out", "none"), ("none", "std")]
        if m is not None:
            relative += [("quantile", "range"), ("second_max", "std")]
            relative += [("length_weighted", "batch_std"), ("given", "mean_abs")]
        for baseline, scale in relative:
            options = (baseline, 0.25, scale, 1e-6, 1, False)
            given, lengths = (rewards if baseline == b else None for b in ("given", "length_weighted"))
            group = (rewards, groups, given, lengths)
            advantages.group_advantages(*group, m, offsets, n, *options)
            advantages.group_advantages(*group, None, None, -1, *options)
            kept = (rewards, rewards)
            advantages.group_advantages_backward(values, rewards, *group, m, offsets, *kept, *options)
            advantages.group_advantages_backward(rewards, None, *group, None, None, *kept, *options)
        shaping = (1.0, 0.1, 0.0, 1e-2)
        entropy.gtpo_rewards(rewards, values, groups, m, offsets, *shaping)
        entropy.gtpo_rewards_backward(values, rewards, values, groups, m, offsets, *shaping)
        segments.row_counts(values > 0, offsets)
        for numbers in (values, values.double()):
            segments.row_sums(numbers, m, offsets)
            selection.largest(numbers, m, offsets, groups, groups)
        for steps in (None, values > 0, values.long()):
            for chunk in (1, 2) if steps is not None and steps.dtype is torch.int64 else (1,):
                td.chunks_of = returns.chunks_of = lambda *_, chunk=chunk: chunk
                returns.extreme_returns(values, m, offsets, steps, False)
            returns.softmin_returns(values, m, offsets, steps, 0.1, True)
            returns.softmin_rewards(values, m, offsets, steps, 0.1, True)
            returns.softmin_rewards_backward(values, values, m, offsets, steps, 0.1, True)
        factors = values.double()
        everything = (values, values, factors, factors)
        for chunk, decay, extra in ((1, False, [None] * 4), (1, True, everything), (2, False, everything)):
            if decay and m is None:
                continue  # without a mask that is the same
            td.chunks_of = lambda *_, chunk=chunk: chunk
            tail = (*extra, m, offsets, 0.9, 0.9, decay)
            td.td_scan(values, values, rewards, *tail)
            td.td_scan_backward(values, values, values, *tail, True, True)
        td.td_scan(values, None, None, *[None] * 4, m, offsets, 0.9, 0.9, False)
        for op in REDUCTIONS if offsets is None else ("max", "last"):
            reduced = segments.segment_reduce(values, values.long(), m, offsets, 20, op)
            segments.segment_reduce_backward(
                rewards[:, None], values, values.long(), *reduced, m, offsets, op
            )
        for ids in (values.long(), values.int()):
            forest = prefix_tree.prefix_tree(ids, groups, m, offsets, False)
        prefix_tree.prefix_lcp(forest[0], groups, 4)
        nodes, by_row = torch.zeros(2 * batch, 1).double(), torch.zeros(batch, 1).double()
        for weights, centre, gamma in (
            (None, None, 1.0),
            (by_row[:, 0], None, 0.9),
            (by_row[:, 0], nodes, 1.0),
        ):
            prefix_tree.subtree_sums(by_row, weights, centre, *forest, gamma)
            prefix_tree.subtree_sums_backward(nodes, by_row, weights, centre, *forest, gamma)
        for at, given, gamma in (
            ("after", (nodes, None, None, None), 1.0),
            ("before", (nodes, nodes, None, by_row), 0.9),
            ("step", (None, nodes, by_row, by_row), 1.0),
        ):
            where = (*forest, m, offsets, False, values.shape[-1], at, gamma)
            for dtype in (torch.float32, torch.float64, torch.int32):
                if dtype is torch.float32 or at == "after":
                    prefix_tree.nodes_to_tokens(*given, *where, dtype)
            prefix_tree.nodes_to_tokens_backward(values[None], *given, *where)
    for reduce in REDUCES:
        for visits in (None, rewards.double()):
            tree.tree_values(groups - 1, rewards.double(), visits, reduce, 0.5, 1)

    distinct = {}
    for kernel, args, kwargs in launches:
        distinct.setdefault(repr(specialise(kernel, args, kwargs)), (kernel, args, kwargs))
    return list(distinct.values())


def specialise(kernel, args, kwargs):
    """(name, signature, constexprs, attributes, options) as the just-in-time compiler would have them."""
    import torch

    names = {torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
             torch.int32: "i32", torch.int64: "i64", torch.uint8: "u8", torch.bool: "i1"}  # fmt: skip
    values = dict(zip(kernel.arg_names, args, strict=False))
    options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
    values.update({k: v for k, v in kwargs.items() if k in kernel.arg_names})
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name], constants[(index,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + names[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if not parameter.do_not_specialize:
                if value == 1:
                    signature[parameter.name], constants[(index,)] = "constexpr", 1
                elif value % 16 == 0:
                    attributes[(index,)] = [["tt.divisibility", 16]]
    return kernel.__name__, signature, constants, attributes, options


def resources(kernel, target: str) -> dict[str, int]:
    """Registers and spilled or stacked bytes, from the machine code."""
    if target == "gfx942":
        text = kernel.asm["amdgcn"]

        def found(key):
            return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

        # Spilled scalar registers stay on chip, in lanes of vector registers; these two are memory.
        spilled = found("vgpr_spill_count") + found("private_segment_fixed_size")
        return {"registers": found("vgpr_count"), "spill": spilled}
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(tool), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": use["REG"], "spill": use["STACK"] + use["LOCAL"]}


def block_loads(ttir: str) -> tuple[list[list[str]], list[str]]:
    """Types of the block loads in each loop's body, and of those outside loops: ``"2048xbf16"``."""
    loops, outside, indent = [], [], None
    for line in ttir.splitlines():
        depth = len(line) - len(line.lstrip())
        if indent is not None and depth <= indent:
            indent = None
        if indent is None and " scf.for " in line:
            indent = depth
            loops.append([])
        found = re.search(r"tt\.load .*: tensor<(\d+)x!tt\.ptr<(\w+)>>", line)
        if found:
            (outside if indent is None else loops[-1]).append("x".join(found.groups()))
    return loops, outside


def specialisations() -> dict[str, int]:
    """How many times each kernel is compiled over many shapes and temperatures, the outputs staying alike."""
    import torch
    from rewardops.triton_kernels import logits

    launches = recorder()

    def count(shapes, start=0):
        launches.clear()
        for (rows, vocab), temperature in itertools.product(shapes, (0.7, 1.0)):
            x = torch.empty(rows, vocab + start)[:, start:]
            inputs = (x, torch.zeros(rows, dtype=torch.int64), x, None, None)
            outputs = ("logprob", "entropy", "kl", "jsd")
            saved, *made = logits.token_stats(*inputs, temperature, 0.0, vocab, 0.3, outputs, False)
            logits.token_stats_backward(
                made, *inputs, saved, temperature, 0.0, vocab, 0.3, outputs, True, True
            )
        found = {repr(specialise(kernel, args, kwargs)) for kernel, args, kwargs in launches}
        return Counter(re.match(r"\('(\w+)'", text).group(1) for text in found)

    aligned = [(n, v) for n in (200, 201, 256, 1024) for v in (1024, 50272, 151936)]
    ragged = [(n, v) for n in (200, 201, 256, 1024) for v in (1000, 1003, 50257, 151936)]
    few = [(n, v) for n in (1, 2, 3) for v in (50272, 151936)]
    return {"aligned": count(aligned), "ragged": count(aligned + ragged), "few": count(few)}


def compile_all(target: str, part: int, parts: int) -> list[dict]:
    """Compile every ``parts``-th launch for a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    found = []
    for kernel, args, kwargs in record()[part::parts]:
        name, signature, constants, attributes, options = specialise(kernel, args, kwargs)
        values = {kernel.arg_names[index]: value for (index,), value in constants.items()}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
        compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options or None)
        row = {"kernel": name, "target": target, **resources(compiled, target)}
        row["types"] = [t for t in signature.values() if t.startswith("*")]
        if "ptx" in compiled.asm:
            ptx = compiled.asm["ptx"]
            row["loads"] = sorted(set(re.findall(r"ld\.global(?:\.L\S+)*((?:\.v\d)?\.b\d+)", ptx)))
            row["stores"] = sorted(set(re.findall(r"st\.global((?:\.v\d)?\.b\d+)", ptx)))
            row["atomics"] = len(re.findall(r"\b(?:atom|red)\.", ptx))
        row["block"] = next((v for k, v in values.items() if k == "BLOCK"), None)
        row["in_loops"], row["outside"] = block_loads(compiled.asm["ttir"])
        found.append(row)
    return found


# ---- in the test process -----------------------------------------------------------------------------------

PARTS = 2
LOGITS_KERNELS = ("token_stats_kernel", "token_stats_mixture_kernel", "token_stats_backward_kernel")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    pytest.importorskip("triton")
    cache = tmp_path_factory.mktemp("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}

    def work(job):
        target, part = job
        done = subprocess.run(
            [sys.executable, __file__, target, str(part), str(PARTS)], env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    jobs = [(target, part) for target in TARGETS for part in range(PARTS)]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return [row for rows in pool.map(work, jobs) for row in rows]


def test_every_kernel_compiles_for_every_target(compiled):
    kernels = {row["kernel"] for row in compiled}
    assert len(kernels) == 30, sorted(kernels)
    for target in TARGETS:
        assert {row["kernel"] for row in compiled if row["target"] == target} == kernels


def test_no_kernel_spills(compiled):
    assert not [row for row in compiled if row["spill"]]


def test_no_kernel_adds_numbers_by_atomics(compiled):
    """Whose order would show in the sum; the digits' counts are integers."""
    assert not [row for row in compiled if row.get("atomics") and row["kernel"] != "digits_kernel"]


@pytest.mark.parametrize("kernel", LOGITS_KERNELS)
def test_logits_move_sixteen_bytes_at_a_time(compiled, kernel):
    rows = [r for r in compiled if r["kernel"] == kernel and r["target"] in ("sm_80", "sm_90", "sm_100")]
    assert {t for r in rows for t in r["types"]} >= {"*fp32", "*bf16", "*fp16"}
    for row in rows:
        assert ".v4.b32" in row["loads"], row
        if "backward" in kernel:
            assert ".v4.b32" in row["stores"], row


@pytest.mark.parametrize("kernel", LOGITS_KERNELS)
def test_every_logit_is_read_once(compiled, kernel):
    """One block load per logits tensor, and one in the tail that is peeled off: the element's size and not a byte
    more, whatever is asked for."""
    tensors = set()
    for row in compiled:
        if row["kernel"] == kernel:
            loop = row["in_loops"][-1]
            assert len(set(loop)) == 1, row
            width, kind = loop[0].split("x")
            assert int(width) == row["block"], row
            assert "*" + {"f32": "fp32", "f16": "fp16"}.get(kind, kind) in row["types"], row
            # The backward kernel takes its tail in the loop, as the other branch.
            assert row["outside"] == ([] if "backward" in kernel else loop), row
            tensors.add(len(loop))
    assert tensors == {"token_stats_kernel": {1, 2}, "token_stats_mixture_kernel": {2}}.get(kernel, {2, 4})


def test_shapes_and_temperature_do_not_recompile():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, __file__, "count"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["aligned"] == dict.fromkeys(LOGITS_KERNELS, 1)
    assert set(counts["ragged"]) == set(LOGITS_KERNELS)
    assert max(counts["ragged"].values()) <= 2  # rows at odd addresses are one more
    # Few rows are split over the vocabulary, and their parts merged.
    assert counts["few"] == dict.fromkeys((*LOGITS_KERNELS, "token_stats_combine"), 1)


if __name__ == "__main__":
    if sys.argv[1] == "count":
        print(json.dumps(specialisations()))
        sys.exit()
    print(json.dumps(compile_all(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
