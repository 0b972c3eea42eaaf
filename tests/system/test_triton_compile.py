"""Triton kernels compile for every target without a GPU, do not spill, and load 16 bytes at a time.

``tests/tools/triton_compile.py`` compiles, in processes of its own: in this one the kernels are interpreted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from once import once
from triton_compile import LOGITS_KERNELS, SCOPES_KERNELS, TARGETS, TREES_KERNELS
from triton_compile import __file__ as PROGRAM

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> list[dict]:
    pytest.importorskip("triton")
    cache = tmp_path_factory.mktemp("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}

    def rows():
        done = subprocess.run([sys.executable, PROGRAM, "compile"], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return json.loads(done.stdout.splitlines()[-1])

    return once(tmp_path_factory, "triton_compile", rows)


def test_every_kernel_compiles_for_every_target(compiled):
    sources = (Path(__file__).resolve().parents[2] / "triton_kernels").glob("*.py")
    kernels = {
        k for p in sources for k in re.findall(r"^def (\w+_(?:kernel|combine))\(", p.read_text(), re.M)
    }
    assert len(kernels) >= 30, sorted(kernels)
    for target in TARGETS:
        assert {row["kernel"] for row in compiled if row["target"] == target} == kernels


def test_no_kernel_spills(compiled):
    """But for a stack frame of 8 bytes in float64, which gradients of advantages have on one target."""
    spilled = [row for row in compiled if row["spill"]]
    framed = "group_advantages_backward_kernel", 8
    assert not [r for r in spilled if "*fp32" in r["types"] or (r["kernel"], r["spill"]) != framed]


def test_no_kernel_adds_numbers_by_atomics(compiled):
    """Whose order would show in the sum; the digits' counts are integers."""
    assert not [row for row in compiled if row.get("atomics") and row["kernel"] != "digits_kernel"]


def test_no_thread_waits_in_a_loop_over_logits(compiled):
    """Threads meet after it, once a row; wherever rows begin."""
    rows = [r for r in compiled if r["kernel"] in LOGITS_KERNELS and "meetings" in r]
    assert {r["align"] for r in rows if r["kernel"] == "token_stats_kernel"} >= {4, 16}
    assert not [r for r in rows if r["meetings"]]


def test_scans_load_sixteen_bytes_and_meet_once_a_tile(compiled):
    """A scan of threads and an exchange with the thread before, for what is scanned and for what comes after it.

    The tiles of td, of sums of steps and of gradients of returns are in two loops, of which one is for rows with
    infinities. Float64 is for the maps of threads, and for the log-sums of soft minima, which are stored in it.
    """
    scans = {row["kernel"] for row in compiled if row.get("per_thread")} - {*SCOPES_KERNELS, *TREES_KERNELS}
    assert len(scans) == 8
    for kernel in scans:
        rows = [r for r in compiled if r["kernel"] == kernel and "barriers" in r]
        assert {r["align"] for r in rows} == {0, 16}
        loops = 2 if "td" in kernel or kernel in ("segment_reduce_kernel", "returns_backward_kernel") else 1
        assert min(r["barriers"] for r in rows) <= 10 * loops
        for row in rows:
            if row["align"] == 16:
                assert {".v4.b32", ".v2.b64"} & set(row["loads"]), row
            assert row["barriers"] <= 24 * loops, row
            if row["types"].count("*fp64") <= 1 and "*fp32" in row["types"]:
                assert row["float64"] <= {"extremes_kernel": 0}.get(kernel, 6 * row["per_thread"]), row


@pytest.mark.parametrize("kernel", SCOPES_KERNELS)
def test_tokens_relative_to_a_scope_move_sixteen_bytes(compiled, kernel):
    """Threads do not wait for each other on the way, but where a part's first valid token is sought.

    Nor where tokens are written; but to write packed rows they exchange tokens.
    """
    rows = [r for r in compiled if r["kernel"] == kernel and "barriers" in r and "*fp32" in r["types"]]
    assert {r["align"] for r in rows} == {0, 16}
    for row in rows:
        if row["align"] == 16:
            assert ".v4.b32" in row["loads"], row
            assert ".v4.b32" in row["stores"] or kernel == "parts_kernel", row
        if kernel == "map_kernel":
            assert row["float64"] == 0, row
            assert row["barriers"] <= (0 if row["align"] == 16 else 2), row


@pytest.mark.parametrize("kernel", LOGITS_KERNELS)
def test_logits_move_sixteen_bytes_at_a_time(compiled, kernel):
    rows = [r for r in compiled if r["kernel"] == kernel and r["target"] in ("sm_80", "sm_90", "sm_100")]
    assert {t for r in rows for t in r["types"]} >= {"*fp32", "*bf16", "*fp16"}
    for row in rows:
        if row["align"] == 16:
            assert ".v4.b32" in row["loads"], row
        if "backward" in kernel:
            assert ".v4.b32" in row["stores"], row


def test_tokens_of_advantages_move_sixteen_bytes_at_a_time(compiled):
    """Wherever rows begin: packed rows, too."""
    rows = [r for r in compiled if r["target"] in ("sm_80", "sm_90", "sm_100")]
    written = [r for r in rows if r["kernel"] == "spread_kernel" and r["types"][0] == "*fp32"]
    # Sums of gradients are float64; without them there is no pointer to float64.
    summed = [r for r in rows if r["kernel"] == "prepare_kernel" and "*fp64" in r["types"]]
    for found, accesses in ((written, "stores"), (summed, "loads")):
        assert {r["align"] for r in found} == {0, 16}
        assert all(".v4.b32" in r[accesses] for r in found if "*fp32" in r["types"])


@pytest.mark.parametrize("kernel", LOGITS_KERNELS)
def test_every_logit_is_read_once(compiled, kernel):
    """One block load per logits tensor in the loop, of the element's size and not a byte more, in every variant.

    One more beside the loop is of the first tile in the forward pass, of the peeled tail in the backward pass.
    """
    tensors = set()
    for row in compiled:
        if row["kernel"] == kernel and row["align"] == 16:
            loop = row["in_loops"][-1 if "backward" in kernel else 0]
            types = row["types"][-2:] if "backward" in kernel else row["types"][:2]
            size = {"*fp32": 4, "*fp64": 8}.get(types[0], 2)
            assert set(loop) == {row["block"] * size}, row
            assert "mixture" in kernel or row["outside"][: len(loop)] == loop, row
            tensors.add(len(loop))
    assert tensors == ({2} if "mixture" in kernel else {1, 2})


# Instructions of a thread for a column of a row, of both models where there are two: a tenth more than there are.
MOST_INSTRUCTIONS = {
    ("token_stats_kernel", "", "logprob and entropy"): 13.5,
    ("token_stats_kernel", "", "every output"): 20.5,
    ("token_stats_kernel", "CAPPED", "logprob and entropy"): 21.5,
    ("token_stats_kernel", "HAS_REF", "every output"): 34.5,
    ("token_stats_kernel", "HAS_REF CAPPED", "every output"): 52.5,
    ("token_stats_mixture_kernel", "", "every output"): 54.0,
    ("token_stats_mixture_kernel", "CAPPED", "every output"): 65.0,
    ("token_stats_backward_kernel", "", "logprob and entropy"): 23.0,
    ("token_stats_backward_kernel", "", "every output"): 24.5,
    ("token_stats_backward_kernel", "CAPPED", "logprob and entropy"): 33.5,
    ("token_stats_backward_kernel", "HAS_REF", "every output"): 99.5,
    ("token_stats_backward_kernel", "HAS_REF CAPPED", "every output"): 122.0,
    ("token_stats_backward_kernel", "OF_RECORD", "every output"): 24.0,
    ("token_stats_backward_kernel", "HAS_REF OF_RECORD", "every output"): 49.5,
}


def test_instructions_per_column(compiled):
    found = {}
    for row in compiled:
        if "per_column" in row:
            # The first two flags are of the logprob and of the entropy.
            outputs = "logprob and entropy" if row["outputs"] in (1, 2, 3) else "every output"
            key = row["kernel"], " ".join(row["of"]), outputs
            found[key] = max(found.get(key, 0.0), row["per_column"])
    assert found.keys() == MOST_INSTRUCTIONS.keys()
    assert not {key: n for key, n in found.items() if n > MOST_INSTRUCTIONS[key]}


def test_shapes_and_temperature_do_not_recompile():
    pytest.importorskip("triton")
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, PROGRAM, "count"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["aligned"] == dict.fromkeys(LOGITS_KERNELS, 1)
    assert set(counts["ragged"]) == set(LOGITS_KERNELS)
    assert max(counts["ragged"].values()) <= 2  # rows at odd addresses are one more
    # Few rows are split over the vocabulary, and their parts merged.
    assert counts["few"] == dict.fromkeys((*LOGITS_KERNELS, "token_stats_combine"), 1)
