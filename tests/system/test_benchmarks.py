"""The suite measures, resumes, compares and reports; the README agrees with the committed results."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import accuracy, case, cases, compare, gpu, memory, readme, run, timing  # noqa: E402
from benchmarks import report as tables  # noqa: E402

CPU = torch.device("cpu")
SETTINGS = run.Settings(sizes="tiny", runs=3, seconds=0.01, compiled=False)
SOME = ("token_stats_backward", "group_advantages")


def quiet(_: str) -> None:
    pass


@pytest.fixture(scope="module")
def measured() -> run.Report:
    """A report with a sweep and a second backend."""
    settings = dataclasses.replace(SETTINGS, backends=("reference",))
    return run.run_all(run.plan([*SOME, "gae"], "tiny", ["length"]), settings, say=quiet)


# ---- how it is timed -----------------------------------------------------------------------------------------


def test_quantiles():
    t = timing.summary(dict(enumerate([5.0, 1.0, 2.0, 4.0, 3.0])))
    assert (t.p20, t.median, t.p80, t.runs) == (2.0, 3.0, 5.0, 5)


def test_ratios_are_of_pairs():
    """Load on the machine slows both runs of a round."""
    ours = {0: 1.0, 1: 5.0, 2: 2.0, 3: 9.0}
    assert timing.paired_ratio({i: 3 * ours[i] for i in (0, 1, 2)}, ours) == timing.Ratio(3, 3, 3, 3)
    g = torch.Generator().manual_seed(0)
    noise = (1 + 0.1 * torch.randn(100, generator=g)).tolist()
    got = timing.paired_ratio(dict(enumerate(noise)), dict.fromkeys(range(100), 0.5))
    assert got == timing.paired_ratio(dict(enumerate(noise)), dict.fromkeys(range(100), 0.5))
    assert 1.9 < got.low < got.median < got.high < 2.1
    assert got.pairs == 100


def test_calls_take_turns():
    log, inside = [], []

    @contextlib.contextmanager
    def around(name):
        inside.append(name)
        yield
        inside.pop()

    def call(name):
        log.append(name)
        assert inside == [name]

    calls = {name: lambda name=name: call(name) for name in "abc"}
    got = timing.interleaved(calls, CPU, runs=8, seconds=100, around=around)
    assert all(list(rounds) == list(range(8)) for rounds in got.values())
    turns = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len({tuple(turn) for turn in turns}) > 1


def test_a_slow_call_sits_out():
    calls = {"slow": lambda: time.sleep(0.2), "quick": lambda: None}
    got = timing.interleaved(calls, CPU, runs=10, seconds=0.8)
    assert list(got["slow"]) == [0, 1, 2]
    assert len(got["quick"]) == 10


def test_copies():
    call, size = timing.copy_of(1000, CPU)
    assert size == 1000
    assert call().numel() * 4 == 500


# ---- memory and error ----------------------------------------------------------------------------------------

PEAK = """
import torch
from benchmarks import memory

def call():
    torch.ones(2**24)  # 64 MiB that are gone again
    return torch.ones(2**22)

{before}
call()
print(memory.peak(call, torch.device("cpu")))
"""


@pytest.mark.parametrize("before", ["", "assert memory.keep()"], ids=["returned", "kept"])
def test_peak_memory(before):
    """Peak memory is right even if freed memory of an earlier call is kept."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK.format(before=before)], cwd=ROOT, capture_output=True, text=True
    )
    if before and "AssertionError" in done.stderr:
        pytest.skip("the C library here has no mallopt")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "None\n" or 2**25 < int(done.stdout) < 2**27


def test_errors():
    inf, nan = float("inf"), float("nan")
    want = torch.tensor([1.0, -4.0, inf, nan], dtype=torch.float64)
    got = torch.tensor([1.5, -4.0, inf, nan])
    assert accuracy.largest_error(got, want) == {"absolute": 0.5, "relative": 0.125}
    assert accuracy.largest_error((got, None, got), (want, want))["absolute"] == 0.5
    for wrong in (-inf, nan, 0.0):
        got[2] = wrong
        assert accuracy.largest_error(got, want)["absolute"] == inf
    assert accuracy.largest_error(torch.tensor([True]), torch.tensor([False]))["absolute"] == 1
    with pytest.raises(ValueError, match="zip"):
        accuracy.largest_error((got, got), (want,))


# ---- rows ----------------------------------------------------------------------------------------------------


def test_a_row(measured):
    assert json.loads(json.dumps(measured, allow_nan=False)) == measured
    assert measured["versions"]["torch"] == torch.__version__
    for row in measured["rows"]:
        assert {"ours", "ours/reference", "eager"} <= set(row["variants"])
        assert row["missing"]["compile"] == "left out of this run"
        assert row["bytes"] > 0
        assert row["roofline"] > 0
        assert not row["best_other"].startswith("ours")
        for name, t in row["variants"].items():
            assert 0 < t["p20"] <= t["median"] <= t["p80"]
            assert t["error"]["relative"] < 1e-2, (row["case"], name)
            assert ("ratio" in t) == (name != "ours")
        assert row["variants"]["ours"]["share_of_copy"] * row["variants"]["ours"]["median"] == pytest.approx(
            row["roofline"], rel=1e-3
        )


def test_a_plan():
    items = run.plan(["token_stats", "gae"], "tiny", ["vocab", "dtype"])
    assert len({item.key() for item in items}) == len(items)
    usual = [i for i in items if i.swept is None]
    assert [(i.case, i.dtype) for i in usual] == [
        (name, dtype) for name in ("token_stats", "gae") for dtype in cases.dtypes(name)
    ]
    assert {i.sizes for i in usual} == {case.TINY}
    vocab = [i for i in items if i.swept == "vocab"]
    assert {i.case for i in vocab} == {"token_stats"}
    assert {i.sizes.vocab for i in vocab} == set(cases.axes("token_stats", quick=True)["vocab"])
    assert {dataclasses.replace(i.sizes, vocab=case.TINY.vocab) for i in vocab} == {case.TINY}
    assert {i.swept for i in run.plan(["gae"], "tiny", ["all"])} >= {None, "length", "rows"}


def changed(monkeypatch, **values):
    """The cases with some fields replaced."""
    make = run.make
    monkeypatch.setattr(run, "make", lambda *a: dataclasses.replace(make(*a), **values))


def test_what_is_missing_is_listed_and_what_is_wrong_shows(monkeypatch):
    def broken(*_):
        raise torch.OutOfMemoryError("too much")

    peers = {
        "absent": case.Missing("absent is not installed"),
        "large": broken,
        "wrong": lambda r, v, *rest: (torch.zeros_like(r), torch.zeros_like(v)),
    }
    changed(monkeypatch, peers=peers)
    got = run.run_all(run.plan(["gae"], "tiny"), SETTINGS, say=quiet)
    (row,) = got["rows"]
    assert row["missing"]["absent"] == "absent is not installed"
    assert row["missing"]["large"] == "out of memory"
    assert row["variants"]["wrong"]["error"]["relative"] == 1
    text = tables.markdown(got)
    assert "- absent: absent is not installed (gae)" in text
    assert "- large: out of memory (gae)" in text
    assert ", 1e+00" in text


def test_ours_that_fails_is_no_row_of_the_table(monkeypatch):
    def broken(*_):
        raise RuntimeError("no kernel")

    changed(monkeypatch, ours=broken)
    lines = []
    got = run.run_all(run.plan(["gae"], "tiny"), SETTINGS, say=lines.append)
    assert lines == ["gae: failed: no kernel"]
    assert "- ours: failed: no kernel (gae)" in tables.markdown(got)


# ---- a run that goes on --------------------------------------------------------------------------------------


def test_a_stopped_run_goes_on(tmp_path, monkeypatch):
    out, items, measure = tmp_path / "out.json", run.plan(SOME, "tiny"), run.measure

    def stopping(item, settings):
        if item.case == "group_advantages":
            raise KeyboardInterrupt
        return measure(item, settings)

    monkeypatch.setattr(run, "measure", stopping)
    with pytest.raises(KeyboardInterrupt):
        run.run_all(items, SETTINGS, out=out, say=quiet)
    before = run.load(out)["rows"]
    assert {row["case"] for row in before} == {"token_stats_backward"}

    measured_cases = []
    monkeypatch.setattr(run, "measure", lambda item, s: measured_cases.append(item.case) or measure(item, s))
    got = run.run_all(items, SETTINGS, out=out, say=quiet)
    assert measured_cases == ["group_advantages"]
    assert got["rows"][: len(before)] == before
    assert got == run.load(out)
    run.run_all(items, SETTINGS, out=out, say=quiet)
    assert len(measured_cases) == 1

    other = dataclasses.replace(SETTINGS, seconds=0.02)
    with pytest.raises(run.Refused, match="another settings"):
        run.run_all(items, other, out=out, say=quiet)
    assert len(run.run_all(items[:1], other, out=out, fresh=True, say=quiet)["rows"]) == 1
    out.write_text("{}")
    with pytest.raises(run.Refused, match="not a report"):
        run.run_all(items, SETTINGS, out=out, say=quiet)


# ---- two reports ---------------------------------------------------------------------------------------------


def scaled(report, factor):
    """A report in which ours takes this many times as long in the first row."""
    changed_report = copy.deepcopy(report)
    for q in ("p20", "median", "p80"):
        changed_report["rows"][0]["variants"]["ours"][q] *= factor
    return changed_report


def test_regressions_beyond_the_noise_are_marked(measured, tmp_path, capsys):
    steady = copy.deepcopy(measured)
    for row in steady["rows"]:
        for t in row["variants"].values():
            t.update(p20=0.98 * t["median"], p80=1.02 * t["median"])
    assert compare.compare(steady, steady)[1] == 0
    assert "REGRESSION" not in compare.compare(steady, scaled(steady, 1.03))[0]  # within the spreads
    text, number = compare.compare(steady, scaled(steady, 1.5))
    assert number == 1
    assert text.count("REGRESSION") == 1
    assert "| 1.50x | 1.00x | REGRESSION |" in text
    assert "| 0.50x | 1.00x | faster |" in compare.compare(steady, scaled(steady, 0.5))[0]
    wide = copy.deepcopy(steady)
    wide["rows"][0]["variants"]["ours"]["p80"] *= 2
    assert compare.compare(wide, scaled(steady, 1.5))[1] == 0
    assert "1 only before, 0 only after" in compare.compare(steady, {**steady, "rows": steady["rows"][1:]})[0]

    other = {**steady, "machine": {"cpu": "another"}}
    a, b, c = (tmp_path / f"{name}.json" for name in "abc")
    for path, content in ((a, steady), (b, scaled(steady, 1.5)), (c, other)):
        path.write_text(json.dumps(content))
    assert command.main(["compare", str(a), str(a)]) == 0
    assert command.main(["compare", str(a), str(b)]) == 1
    capsys.readouterr()
    assert command.main(["compare", str(a), str(c)]) == 2
    assert capsys.readouterr().out.startswith("not compared: another machine")
    assert command.main(["compare", str(a), str(c), "--anyway"]) == 0


# ---- what is made of a report --------------------------------------------------------------------------------


def test_tables(measured):
    text = tables.markdown(measured)
    assert text.count("| token_stats_backward, bfloat16 |") == 3  # times, other backends, memory
    assert "| gae, length = 128 |" in text
    assert "torch.compile: left out of this run" in text
    row = measured["rows"][0]
    assert f"{tables.ms(row['variants']['ours']['median'])} | " in text
    for lines in text.split("\n\n"):
        if lines.startswith("|"):
            assert len({line.count("|") for line in lines.splitlines()}) == 1


def test_plots(measured, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "some.json").write_text(json.dumps(measured))
    assert command.main(["report", str(tmp_path / "some.json"), "--out", str(tmp_path / "out")]) == 0
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"some.md", "some.png", "some-gae.png"} | (
        {"some-group_advantages.png"} if "length" in cases.axes("group_advantages") else set()
    )


def test_a_report_without_matplotlib(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "some.json").write_text(json.dumps(measured))
    assert command.main(["report", str(tmp_path / "some.json"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "some.md").exists()
    assert "no plots" in capsys.readouterr().out


# ---- the README ----------------------------------------------------------------------------------------------


def test_readme_is_in_step():
    """`python -m benchmarks readme` after a change of benchmarks/results."""
    for path, section in ((readme.README, readme.few()), (readme.MEASUREMENTS, readme.section())):
        text = path.read_text()
        assert readme.replaced(text, section) == text
    assert readme.few().count("\n| ") == len(readme.FEW)
    for path, report in readme.committed():
        assert path.with_suffix(".md").read_text() == tables.markdown(report)
        assert readme.digest(path).encode() in path.with_suffix(".png").read_bytes()
    for name, path, *_ in readme.figures():
        assert readme.digest(path) in (ROOT / "docs" / name).read_text()


def test_readme_is_rewritten(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(
        readme, "FIGURES", {"lengths.svg": ("gae", ("length",)), "none.svg": ("gae", ("rows",))}
    )
    text = f"# Title\n\n{readme.BEGIN}\nold\n{readme.END}\n\nrest\n"
    (tmp_path / "README.md").write_text(text)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "measurements.md").write_text(text)
    (tmp_path / "a-machine.json").write_text(json.dumps(measured))
    assert readme.section(tmp_path / "docs") == "No results are committed yet.\n"
    inner = readme.section(tmp_path)
    assert tables.where(measured) in inner
    assert measured["commit"] in inner
    assert "| token_stats_backward, bfloat16 |" in inner
    with pytest.raises(ValueError, match="not there"):
        readme.replaced("# Title\n", inner)
    pytest.importorskip("matplotlib")
    written = readme.rewrite(tmp_path, tmp_path / "README.md", tmp_path / "docs" / "measurements.md")
    documents = {"README.md", "measurements.md"}
    assert {p.name for p in written} == documents | {"a-machine.md", "a-machine.png", "lengths.svg"}
    assert readme.digest(tmp_path / "a-machine.json") in (tmp_path / "docs" / "lengths.svg").read_text()
    assert (tmp_path / "README.md").read_text() == readme.replaced(text, readme.few(tmp_path))
    assert (tmp_path / "docs" / "measurements.md").read_text() == readme.replaced(text, inner)
    picture = (tmp_path / "a-machine.png").read_bytes()
    assert readme.digest(tmp_path / "a-machine.json").encode() in picture


# ---- commands ------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(run.SIZES, "quick", case.TINY)
    monkeypatch.setattr(memory, "keep", lambda: True)


def test_run_is_the_default_command(tiny, tmp_path, capsys):
    out = tmp_path / "out.json"
    few = ["--quick", "--no-compile", "--seconds", "0.01", "--out", str(out)]
    assert command.main(["--case", "group_advantages", *few]) == 0
    assert command.main(["run", "--case", "kl", *few]) == 0
    got = run.load(out)
    assert {row["case"] for row in got["rows"]} == {"group_advantages", *cases.names("kl")}
    assert got["settings"]["keep_memory"]
    assert "| group_advantages |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        command.main(["--case", "group_advantages", "--return-memory", *few])
    assert "another settings" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--case", "nothing"])
    assert "no case or family 'nothing'" in capsys.readouterr().err


def test_list(capsys):
    assert command.main(["list", "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    for name in cases.names():
        assert f"  {name} (" in text


def test_pytest_benchmark(tmp_path):
    # pytest-benchmark disables timing in workers of pytest-xdist.
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}

    def once(*arguments):
        chosen = ["-k", "group_advantages", "--benchmark-storage", str(tmp_path), "-p", "no:cacheprovider"]
        return subprocess.run(
            [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", *chosen, *arguments],
            cwd=ROOT,
            env={**env, "PYTEST_ADDOPTS": ""},
            capture_output=True,
            text=True,
            timeout=300,
        )

    done = once("--benchmark-save", "one")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (saved,) = tmp_path.glob("*/*_one.json")
    got = json.loads(saved.read_text())["benchmarks"]
    assert {b["group"] for b in got} >= {"group_advantages, float32"}
    assert all(b["extra_info"]["bytes"] > 0 for b in got)
    done = once("--benchmark-compare", "0001")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "(0001_one)" in done.stdout


def walk_dry(out: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--dry", "--out", str(out), *options],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.mark.slow
def test_gpu_script_walks_without_a_gpu(tmp_path):
    """A dry run has the same parts as a run on a GPU; parts that passed are not repeated."""
    done = walk_dry(tmp_path, "--fresh")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "build ok, test ok, device ok, verify ok, sanitize ok, time ok" in done.stdout
    (path,) = tmp_path.glob("dry-*.json")
    got = run.load(path)
    first = [cases.names(family)[0] for family in cases.families()]
    assert [row["case"] for row in got["rows"]] == [name for name in first for _ in cases.dtypes(name)]
    assert all("ours" in row["variants"] for row in got["rows"])
    assert set(got["qualification"]) == set(gpu.PARTS)
    page = path.with_suffix(".md").read_text()
    assert page.count("| sanitize | ok |") == 1
    again = walk_dry(tmp_path)
    assert again.returncode == 0, again.stdout[-3000:] + again.stderr[-3000:]
    assert again.stdout.count("passed before") == len(gpu.PARTS)
    assert path.with_suffix(".md").read_text() == page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_script_says_that_there_is_none():
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu"], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2
    assert "no GPU" in done.stdout
