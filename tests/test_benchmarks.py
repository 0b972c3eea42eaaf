"""The benchmark cases compute the same as the ops, and the GPU script walks through without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import cases, curves, memory, run, timing  # noqa: E402


@pytest.mark.parametrize("name", cases.NAMES)
def test_variants_agree(name):
    case = cases.make(name, cases.TINY, torch.device("cpu"), dtype=torch.float32)
    ours, plain = case.ours(*case.inputs), case.plain(*case.inputs)
    pairs = [(ours, plain)] if isinstance(ours, torch.Tensor) else zip(ours, plain, strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for peer in case.peers.values():
        theirs = peer(*case.inputs)
        pairs = [(ours, theirs)] if isinstance(ours, torch.Tensor) else zip(ours, theirs, strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert case.bytes_moved > 0


def test_a_report_and_its_table():
    report = run.run_all(
        ["token_stats_backward", "group_advantages"],
        cases.TINY,
        torch.device("cpu"),
        runs=3,
        compiled=False,
        progress=lambda _: None,
    )
    assert json.loads(json.dumps(report)) == report
    table = run.markdown(report)
    # In the tables of times and of memory.
    assert table.count("| token_stats_backward, float32 |") == 2
    assert table.count("| token_stats_backward, bfloat16 |") == 2
    assert table.count("| group_advantages |") == 3  # and in that of floors
    assert "not run" in table  # torch.compile was left out, and the table says so
    for row in report["cases"]:
        assert row["variants"]["ours"]["median"] > 0
        assert row["largest_difference"]["eager"] < 0.05


def test_curves(tmp_path, monkeypatch):
    for name, value in (
        ("ROWS", 8),
        ("LENGTH", 20),
        ("GROUPS", (1, 4)),
        ("SHARED", (0, 5)),
        ("USUAL", {"group": 2, "shared": 4}),
    ):
        monkeypatch.setattr(curves, name, value)
    found = curves.measure(torch.device("cpu"), seconds=0.01)
    assert [p["group"] for p in found["group"]] == [1, 4]
    assert [p["shared"] for p in found["shared"]] == [0, 5]
    for p in found["group"] + found["shared"]:
        assert set(p["ms"]) == set(curves.VARIANTS)
        assert 0 <= p["saved"] < 1
    pytest.importorskip("matplotlib")
    curves.plot(found, tmp_path / "cost.svg")
    assert "dictionary trie" in (tmp_path / "cost.svg").read_text()


def test_peak_memory():
    def call():
        torch.ones(2**24)  # 64 MiB that are gone again
        return torch.ones(2**22)

    call()
    found = memory.peak(call, torch.device("cpu"))
    assert found is None or 2**25 < found < 2**27


def test_quantiles():
    t = timing._quantiles([5.0, 1.0, 2.0, 4.0, 3.0])
    assert (t.p20, t.median, t.p80, t.runs) == (2.0, 3.0, 5.0, 5)


def test_gpu_script_walks_without_a_gpu(tmp_path):
    """The same steps as on a GPU, so that it works there the first time."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "build ok, tests ok, timing ok" in done.stdout
    (report,) = tmp_path.glob("dry-*.json")
    found = json.loads(report.read_text())
    assert found["backend"] == "triton"
    assert [row["case"] for row in found["cases"]] == [n for n in cases.NAMES for _ in cases.dtypes(n)]
    assert report.with_suffix(".md").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_none():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "no GPU" in done.stdout
