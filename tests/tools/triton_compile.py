"""Compiles Triton kernels for every target without a GPU: the program that ``test_triton_compile.py`` runs.

    python tests/tools/triton_compile.py compile | count

The launches to compile are recorded from the real callers: kernels are replaced by recorders, every public function
and the tables here call the ops on CPU tensors, and each distinct launch is compiled ahead of time as the
just-in-time compiler would specialise it. Kernels must not be interpreted (``TRITON_INTERPRET=0``).

Every launch is compiled for NVIDIA, and in a thorough run for AMD, too. Otherwise AMD gets launches with every
constant and every dtype of every kernel, but not all combinations: a spill of one of them is left to that run.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from unittest import mock

TARGETS = {"sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
LOGITS_KERNELS = ("token_stats_kernel", "token_stats_mixture_kernel", "token_stats_backward_kernel")
SCOPES_KERNELS = ("parts_kernel", "map_kernel")
# Whose combinations of constants are all compiled, in every run; of other kernels every constant, once.
COMBINED = (
    *LOGITS_KERNELS, "token_stats_combine", "spread_kernel", "prepare_kernel", "td_kernel", "td_backward_kernel",
    "extremes_kernel", "softmin_kernel", "softmin_returns_kernel", "returns_backward_kernel",
)  # fmt: skip
TREES_KERNELS = ("nodes_to_tokens_kernel", "nodes_backward_kernel", "rows_backward_kernel")
THOROUGH = os.environ.get("REWARDOPS_THOROUGH", "0") not in ("", "0")
if THOROUGH:
    TARGETS |= {f"sm_{code}": ("cuda", code, 32) for code in (80, 100, 103, 120)}


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
    """A launch of every specialisation to compile: those of the tables, and what is new in those of the calls."""
    launches = recorder()
    for table in TABLES:
        table()
    distinct = {repr(specialise(*launch)): launch for launch in launches}
    listed, seen = {kernel for kernel, *_ in launches}, set().union(*(traits(*launch) for launch in launches))
    launches.clear()
    record_calls()
    for launch in launches:
        # For a kernel of the tables, one further launch of every constant and dtype that they lack is enough.
        if launch[0] not in listed or not traits(*launch) <= seen:
            distinct.setdefault(repr(specialise(*launch)), launch)
            seen |= traits(*launch)
    return list(distinct.values())


def traits(kernel, args, kwargs) -> set:
    """The constants of a launch, and the types of its arguments, one by one."""
    _, signature, constants, *_ = specialise(kernel, args, kwargs)
    fixed = {(kernel.arg_names[i], v) for (i,), v in constants.items() if kernel.params[i].is_constexpr}
    pointers = {(name, kind) for name, kind in signature.items() if kind.startswith("*")}
    return {(kernel.__name__, *trait) for trait in fixed | pointers}


# ---- launches of every op, by the calls of the public functions


def record_calls() -> None:
    """Every call of ``rewardops.testing.calls``, forward and backward: every op, a new one too.

    For each op that runs, Triton's implementation records its launches, and the specification computes the result.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    from rewardops.core import dispatch
    from rewardops.testing.calls import LAYOUTS, calls, make_batch

    def run(_, family, op, args):
        for package in ("triton_kernels", "reference"):
            implementation = getattr(importlib.import_module(f"rewardops.{package}.{family}"), op)
            result = implementation(*args)
        return result

    torch.set_num_threads(1)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if THOROUGH else []))
    with mock.patch.object(dispatch, "_run", run):
        for layout, dtype in itertools.product(LAYOUTS, dtypes):
            # Sizes that are multiples of 16, as those of real batches.
            for call in calls(make_batch(16, 16, 16, layout=layout, dtype=dtype)):
                leaves = [x.clone().requires_grad_(call.differentiable) for x in call.inputs]
                outputs = [o for o in tree_leaves(call.fn(*leaves)) if o is not None and o.requires_grad]
                if outputs:
                    ups = [torch.ones_like(o) for o in outputs]
                    torch.autograd.grad(outputs, leaves, ups, allow_unused=True)


# ---- launches of real sizes, and of options that no call combines


def layouts() -> list:
    """Values of a batch: padded with a mask, and packed with offsets."""
    import torch

    batch, width = 8, 4096
    cu = torch.arange(0, batch * width + 1, width, dtype=torch.int32)
    mask = torch.ones(batch, width).bool()
    return [(torch.zeros(batch, width), mask, None), (torch.zeros(batch * width), None, cu)]


def per_row():
    """Groups and rewards of that batch."""
    import torch

    return torch.arange(8) // 4, torch.zeros(8)


def of_logits() -> None:
    import torch
    from rewardops.triton_kernels import logits

    from rewardops.reference.logits import OUTPUTS, TokenStatsArgs

    vocab, policy, two = 151936, OUTPUTS[:7], ("logprob", "entropy")
    both = (*policy, "ref_logprob", "kl", "reverse_kl")
    ids, mask, temperatures = torch.zeros(40).long(), torch.ones(40).bool(), torch.ones(40).double()
    capped = {"softcap": 30.0, "temperatures": temperatures}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.empty(40, vocab, dtype=dtype)
        a = TokenStatsArgs(x, ids, None, None, None, 0.7, 0.0, 0, vocab, 0.3, two)
        few = {"logits": x[:2], "tokens": ids[:2]}  # their rows are split
        for change in (
            *({"outputs": o, **rows} for o in (two, ("logprob",)) for rows in ({}, {"mask": mask}, few)),
            {"outputs": (*two, "kl"), "ref_logits": x},
            {"outputs": (*two, "kl"), "ref_logits": x[:2], **few},
            {"outputs": policy},
            {"logits": torch.empty(40, 128258, dtype=dtype), "vocab": 128258},  # rows begin anywhere
            {"outputs": (*both, "jsd"), "ref_logits": x},
            capped,
            {"outputs": (*both, "jsd"), "ref_logits": x, **capped},
        ):  # fmt: skip
            args = a._replace(**change)
            saved, *results = logits.token_stats(args, False)
            grads = [None if name == "is_top1" else g for name, g in zip(args.outputs, results, strict=True)]
            logits.token_stats_backward(grads, saved, args, True, args.ref_logits is not None)
        for args in (a, a._replace(outputs=both, ref_logits=x)):
            records = logits.token_stats_partial(args)
            logits.token_stats_partial_backward(records, records, args, True, args.ref_logits is not None)


def of_kl() -> None:
    from rewardops.triton_kernels import kl

    from rewardops.reference.kl import ESTIMATORS, TokenKlArgs

    for (values, mask, _), estimator in itertools.product(layouts(), ESTIMATORS):
        a = TokenKlArgs(values, values, mask, None, None, estimator, 20.0, math.inf, 0.1, True, 3.0)
        kl.token_kl(a._replace(old_logprob=values if estimator == "k3" else None))
        kl.token_kl_backward(values, a, True, True)


def of_advantages() -> None:
    from rewardops.triton_kernels import advantages

    from rewardops.reference.advantages import AdvantagesArgs

    groups, rewards = per_row()
    for values, mask, cu in layouts():
        count = -1 if cu is None else values.numel()
        relative = [("mean", "std"), ("leave_one_out", "none"), ("none", "std"), ("none", "none")]
        if cu is None:
            relative += [("quantile", "range"), ("second_max", "std")]
            relative += [("length_weighted", "batch_std"), ("values", "mean_abs")]
        for baseline, scale in relative:
            per_baseline = (rewards if baseline == b else None for b in ("values", "length_weighted"))
            options = (baseline, 0.25, scale, 1e-6, 1, False, False)
            a = AdvantagesArgs(rewards, groups, *per_baseline, mask, cu, count, *options)
            of_rows = a._replace(mask=None, cu_seqlens=None, num_tokens=-1)
            sizes = a._replace(contiguous=True)
            for args, grads in ((a, (values, rewards)), (sizes, (values, None)), (of_rows, (rewards, None))):
                advantages.group_advantages(args)
                advantages.group_advantages_backward(*grads, rewards, rewards, args)


def of_entropy() -> None:
    from rewardops.triton_kernels import entropy

    from rewardops.reference.entropy import GtpoArgs

    groups, rewards = per_row()
    for values, mask, cu in layouts():
        for contiguous in (False, True):
            a = GtpoArgs(rewards, values, groups, mask, cu, 1.0, 0.1, 0.0, 1e-2, contiguous)
            entropy.gtpo_rewards(a)
            entropy.gtpo_rewards_backward(values, a)


def of_scopes() -> None:
    from rewardops.triton_kernels import scopes

    from rewardops.reference.scopes import FORMS, BonusArgs, StandardizedArgs, WeightsArgs

    groups, rewards = per_row()
    for values, mask, cu in layouts():
        for of_tokens, of_rows, outcomes, flag in (
            (None, None, None, True),
            (values, None, None, False),
            (None, groups, rewards, True),
        )[0 if cu is None or THOROUGH else 2 :]:
            a = StandardizedArgs(
                values, of_tokens, mask, cu, of_rows, outcomes, 0.0, 1e-8, 1, flag, flag, flag
            )
            _, statistics = scopes.standardized(a)
            scopes.standardized_backward(values, statistics, a)
        for form, of_rows in zip(FORMS, (None, groups, None), strict=True):
            b = WeightsArgs(values, mask, cu, of_rows, form, 1.0, 1e-2)
            _, statistics = scopes.scope_weights(b)
            scopes.scope_weights_backward(values, statistics, b)
        scopes.covariance_terms(values, values, mask, cu)
    for values, mask, cu in layouts():
        if cu is None:
            bonus = BonusArgs(values, values, mask, 0.4, 2.0)
            scopes.capped_bonus(bonus)
            scopes.capped_bonus_backward(values, bonus)
            for form in ("linear", "exponential"):
                scopes.steered(values, mask, form, 0.8, 1.2)


def of_segments() -> None:
    import torch
    from rewardops.triton_kernels import segments, selection

    from rewardops.reference.segments import REDUCTIONS, SegmentsArgs
    from rewardops.reference.selection import LargestArgs

    groups, _ = per_row()
    for values, mask, cu in layouts():
        segments.row_counts(values > 0, cu)
        for numbers in (values, values.double()):
            segments.row_sums(numbers, mask, cu)
            for band, scopes in ((None, None), (numbers, groups)):
                args = LargestArgs(numbers, mask, band, cu, scopes, 0.2, band is None, 0.0, 1.0)
                selection.largest(args)
        for steps in (values.long(), values > 0, None):
            # Every reduction by ids; what else may differ, by two of them.
            by_ids = steps is not None and steps.dtype is not torch.bool
            for op in REDUCTIONS if cu is None and (by_ids or THOROUGH) else ("sum", "max"):
                a = SegmentsArgs(values, steps, mask, cu, 20, op)
                cut = op == "sum" and (by_ids or cu is None)
                for chunks in (1, 2) if cut or (THOROUGH and op in ("sum", "max")) else (1,):
                    with mock.patch.object(segments, "chunk_of", return_value=values.shape[-1] // chunks):
                        out, kept = segments.segment_reduce(a)
                        segments.segment_reduce_backward(out, out, kept, a)
                        if steps is not None and op == "sum":
                            segments.steps_to_tokens(out, steps, mask, cu, True)


def of_returns() -> None:
    import torch
    from rewardops.triton_kernels import returns, returns_backward

    from rewardops.reference.returns import ReturnsArgs

    for values, mask, cu in layouts():
        for steps in (None, values > 0, values.long()):
            a = ReturnsArgs(values, mask, cu, steps)
            cut = steps is not None and steps.dtype is torch.int64 and (cu is None or THOROUGH)
            for chunks in (1, 2) if cut else (1,):
                chunk = mock.Mock(return_value=values.shape[-1] // chunks)
                with (
                    mock.patch.multiple(returns, chunk_of=chunk),
                    mock.patch.multiple(returns_backward, chunk_of=chunk),
                ):
                    returns.extreme_returns(a, False)
                    returns.extreme_returns_backward(values, values, a, False)
                    returns.softmin_returns_backward(values, values.double(), a, 0.1)
            returns.softmin_returns(a, 0.1, True)
            returns.softmin_rewards(a, 0.1, True)
            returns.softmin_rewards_backward(values, a, 0.1, True)


def of_td() -> None:
    from rewardops.triton_kernels import td

    from rewardops.reference.td import TdArgs

    _, rewards = per_row()
    for values, mask, cu in layouts():
        a = TdArgs(values, values, rewards, mask=mask, cu_seqlens=cu, gamma=0.9, lam=0.9)
        factors = {"rho": values, "trace": values, "gammas": values.double(), "lambdas": values.double()}
        alone = {"values": None, "bootstrap": None}
        for chunks, changes in (
            (1, {}),
            (1, {"decay": True, **factors}),
            (2, factors),
            (1, alone),
            (2, alone),
        ):
            args = a._replace(**changes)
            if args.decay and mask is None:
                continue  # without a mask that is the same
            with mock.patch.object(td, "chunk_of", return_value=values.shape[-1] // chunks):
                td.td_scan(args)
                if args.values is not None:
                    td.td_scan_backward(values, values, args, True, True)


def of_trees() -> None:
    import torch
    from rewardops.triton_kernels import prefix_tree, tree

    from rewardops.reference.prefix_tree import NodeTokensArgs, PrefixTreeArgs, SubtreeArgs
    from rewardops.reference.tree import FORMS, REDUCES, TreeArgs

    groups, rewards = per_row()
    nodes, by_row = torch.zeros(16, 1).double(), torch.zeros(8, 1).double()
    weights = by_row[:, 0]
    for values, mask, cu in layouts():
        for ids in (values.long(), values.int()):
            forest = prefix_tree.prefix_tree(PrefixTreeArgs(ids, groups, mask, cu, False))
        prefix_tree.prefix_lcp(forest[0], groups, 4)
        for of_rows, statistic, gamma in ((None, "sum", 1.0), (weights, "mean", 0.9), (weights, "std", 1.0)):
            a = SubtreeArgs(by_row, of_rows, *forest, gamma, statistic, 1)
            found = prefix_tree.subtree_statistics(a)
            prefix_tree.subtree_statistics_backward(nodes, *found, a)
        for at, terms, gamma in (
            ("after", (nodes, None, None, None), 1.0),
            ("before", (nodes, nodes, None, by_row), 0.9),
            ("step", (None, nodes, by_row, by_row), 1.0),
        ):
            b = NodeTokensArgs(*terms, *forest, mask, cu, False, values.shape[-1], at, gamma)
            for dtype in (torch.float32, torch.float64, torch.int32) if at == "after" else (torch.float32,):
                prefix_tree.nodes_to_tokens(b, dtype)
            prefix_tree.nodes_to_tokens_backward(values[None], b)
    parent, leaves = forest[1][3], nodes[:, 0]
    tree.sibling_labels(parent)
    for form in FORMS:
        _, root = tree.tree_rl(nodes, parent, leaves, form)
        tree.tree_rl_backward(nodes, parent, leaves, root, form)
    for reduce, visits in itertools.product(REDUCES, (None, rewards.double())):
        tree.tree_values(TreeArgs(groups - 1, rewards.double(), visits, reduce, 0.5, 1))


TABLES = (of_logits, of_kl, of_advantages, of_entropy, of_scopes, of_segments, of_returns, of_td, of_trees)


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


def disassembled(cubin: bytes, what: str) -> str:
    """What cuobjdump says of machine code."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([str(tool), what, file.name], capture_output=True, text=True, check=True).stdout


def instructions_per_column(sass: str, kind: str, tensors: int) -> float:
    """Instructions of a thread for a column of ``tensors`` models, in the loop over whole tiles.

    That is, of the innermost loops, the one that loads most.
    """
    size = {"*fp32": 4, "*fp64": 8}.get(kind, 2)
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(\S.*?)\s*;", sass)]
    loops = []
    for at, text in code:
        branch = re.search(r"\bBRA(?:\.U)? .*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < at:
            loops.append((int(branch[1], 16), at))
    inner = [a for a in loops if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    bodies = [[text for at, text in code if first <= at <= last] for first, last in inner]

    def loaded(body):
        loads = [load[0] for text in body if (load := re.search(r"\bLDG\S*", text))]
        return sum(int((re.search(r"\.[US]?(8|16|64|128)\b", load) or (0, 32))[1]) // 8 for load in loads)

    body = max(bodies, key=loaded)
    return round(len(body) * size * tensors / loaded(body), 1)


def resources(kernel, target: str) -> dict[str, int]:
    """Registers and spilled or stacked bytes, from the machine code."""
    if target == "gfx942":
        text = kernel.asm["amdgcn"]

        def found(key):
            return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

        # Spilled scalar registers stay on chip, in lanes of vector registers; these two are memory.
        spilled = found("vgpr_spill_count") + found("private_segment_fixed_size")
        return {"registers": found("vgpr_count"), "spill": spilled}
    text = disassembled(kernel.asm["cubin"], "--dump-resource-usage")
    use = {k: int(v) for k, v in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": use["REG"], "spill": use["STACK"] + use["LOCAL"]}


def block_loads(ttir: str) -> tuple[list[list[int]], list[int]]:
    """Bytes of the block loads in each loop's body, and of those outside loops."""
    loops, outside, indent = [], [], None
    for line in ttir.splitlines():
        depth = len(line) - len(line.lstrip())
        if indent is not None and depth <= indent:
            indent = None
        if indent is None and " scf.for " in line:
            indent = depth
            loops.append([])
        found = re.search(r"tt\.load .*: tensor<((?:\d+x)+)!tt\.ptr<[a-z]+(\d+)>>", line)
        if found:
            size = math.prod(int(n) for n in found[1].split("x")[:-1]) * int(found[2]) // 8
            (outside if indent is None else loops[-1]).append(size)
    return loops, outside


def in_loops(ptx: str, pattern: str) -> int:
    """Lines of loops that match."""
    labels: dict[str, int] = {}
    found = set()
    lines = ptx.splitlines()
    for here, line in enumerate(lines):
        if label := re.match(r"(\$L__BB\w+):", line):
            labels[label[1]] = here
        elif (branch := re.search(r"\bbra(?:\.uni)?\s+(\$L__BB\w+);", line)) and branch[1] in labels:
            body = range(labels[branch[1]], here)
            found |= {i for i in body if re.search(pattern, lines[i])}
    return len(found)


def specialisations() -> dict[str, int]:
    """How many times each kernel is compiled over many shapes and temperatures, the outputs staying alike."""
    import torch
    from rewardops.triton_kernels import logits

    from rewardops.reference.logits import TokenStatsArgs

    launches = recorder()

    def count(shapes, start=0):
        launches.clear()
        for (rows, vocab), temperature in itertools.product(shapes, (0.7, 1.0)):
            x = torch.empty(rows, vocab + start)[:, start:]
            outputs = ("logprob", "entropy", "kl", "jsd")
            ids = torch.zeros(rows, dtype=torch.int64)
            a = TokenStatsArgs(x, ids, x, None, None, temperature, 0.0, 0, vocab, 0.3, outputs)
            saved, *results = logits.token_stats(a, False)
            logits.token_stats_backward(results, saved, a, True, True)
        found = {repr(specialise(kernel, args, kwargs)) for kernel, args, kwargs in launches}
        return Counter(re.match(r"\('(\w+)'", text).group(1) for text in found)

    aligned = [(n, v) for n in (200, 201, 256, 1024) for v in (1024, 50272, 151936)]
    ragged = [(n, v) for n in (200, 201, 256, 1024) for v in (1000, 1003, 50257, 151936)]
    few = [(n, v) for n in (1, 2, 3) for v in (50272, 151936)]
    return {"aligned": count(aligned), "ragged": count(aligned + ragged), "few": count(few)}


def covering(launches: list) -> list:
    """Launches with all traits of these. Those with the most outputs come last in a table: they are taken first."""
    found, seen = [], set()
    for launch in reversed(launches):
        if not traits(*launch) <= seen:
            found.append(launch)
            seen |= traits(*launch)
    return found


def compile_launch(job: tuple) -> dict:
    """Compile a launch for a target."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, (kernel, args, kwargs) = job
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
        # Barriers and shuffles: places where threads wait for each other.
        row["meetings"] = in_loops(ptx, r"\b(?:bar|barrier|shfl)\.")
        row["barriers"] = in_loops(ptx, r"\b(?:bar|barrier)\.")
        row["float64"] = in_loops(ptx, r"\b(?:add|sub|mul|fma|div|setp|cvt)\.\S*f64\b")
        row["per_thread"] = values.get("PER")
        row["atomics"] = len(re.findall(r"\b(?:atom|red)\.", ptx))
    row["block"] = values.get("BLOCK") or math.prod(values.get(k, 0) for k in ("H", "T", "E"))
    # In the backward pass peeled rows are as good as aligned ones.
    wide = values.get("ALIGNED", True) or values.get("PEEL", False)
    row["align"] = values.get("ALIGN", 16 if wide else 0)
    if target.startswith("sm_") and name in LOGITS_KERNELS:
        row["per_column"] = instructions_per_column(
            disassembled(compiled.asm["cubin"], "-sass"), signature["logits"], 1 + values.get("HAS_REF", True)
        )
        row["of"] = [k for k, v in values.items() if v and k in ("HAS_REF", "CAPPED", "OF_RECORD")]
        row["outputs"] = values.get("WANT", values.get("GRADS"))
    row["in_loops"], row["outside"] = block_loads(compiled.asm["ttir"])
    return row


JOBS: list[tuple] = []  # of compile_all: its processes inherit the launches, which cannot be sent to them


def compile_job(index: int) -> dict:
    return compile_launch(JOBS[index])


def compile_all() -> list[dict]:
    """Compile the launches for all targets, by a process of each core."""
    launches = record()
    combined = [launch for launch in launches if launch[0].__name__ in COMBINED]
    others = covering([launch for launch in launches if launch[0].__name__ not in COMBINED])
    for target, (kind, *_) in TARGETS.items():
        chosen = combined + others if kind == "cuda" else covering(launches)
        JOBS.extend((target, launch) for launch in (launches if THOROUGH else chosen))
    with multiprocessing.get_context("fork").Pool(os.cpu_count()) as pool:
        return pool.map(compile_job, range(len(JOBS)), chunksize=1)


if __name__ == "__main__":
    print(json.dumps(specialisations() if sys.argv[1] == "count" else compile_all()))
