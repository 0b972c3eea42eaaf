"""The list of planted faults fits the sources, its page fits the list, and the tool plants and judges faults."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import mutations
import pytest
from faults import FAULTS
from mutations import ROOT, Copy, FaultyList, planted, verdict

from rewardops.core.families import FAMILIES


def test_every_text_occurs_once():
    for fault in FAULTS:
        assert planted((ROOT / fault.file).read_text(), fault).count(fault.instead) >= 1, fault.name
        assert fault.text != fault.instead, fault.name
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    with pytest.raises(FaultyList, match=f"has the text of '{re.escape(FAULTS[0].name)}' 0 times, want once"):
        planted("", FAULTS[0])


def test_every_family_and_backend_has_faults():
    tested = {Path(fault.tests).stem.removeprefix("test_") for fault in FAULTS}
    assert set(FAMILIES) - {"shaping"} <= tested  # shaping has no kernels
    kernels = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc/include/rewardops/cuda").glob("*.cuh")}
    assert kernels - {fault.file for fault in FAULTS} <= {
        "csrc/include/rewardops/cuda/block.cuh",
        "csrc/include/rewardops/cuda/td.cuh",  # tested through scan.cuh
    }


def test_the_page_is_of_this_list():
    page = (ROOT / "docs" / "mutations.md").read_text()
    assert page.startswith(mutations.HEAD)
    rows = [line.strip("| ").split(" | ") for line in page.removeprefix(mutations.HEAD).splitlines()[2:]]
    assert [row[:3] for row in rows] == [[f.name, f.kind, f"`{f.file}`"] for f in FAULTS]
    for fault, (*_, by) in zip(FAULTS, rows, strict=True):
        name = re.match(r"`(?:Test_\w+::)?(test_\w+)", by)
        assert name, f"{fault.name} is caught by {by}"
        assert f"def {name[1]}(" in (ROOT / fault.tests).read_text(), fault.name


@pytest.mark.parametrize(
    ("code", "output", "caught_by", "judged"),
    [
        (
            1,
            "FAILED tests/t.py::test_a[x - y] - AssertionError: Tensor-likes",
            "tests/t.py::test_a[x - y]",
            True,
        ),
        (1, "FAILED tests/t.py::test_a - assert 3 == 4\n1 failed", "tests/t.py::test_a", True),
        (0, "2 passed, 3 skipped in 1.00s", None, True),
        (0, "3 skipped in 1.00s", None, False),
        (1, "FAILED tests/t.py::test_a - NameError: name 'y' is not defined", None, False),
        (1, "ERROR tests/t.py::test_a - RuntimeError: c++ failed", None, False),
        (5, "12 deselected in 0.10s", None, False),
        (-11, "", None, False),
    ],
)
def test_verdicts(code, output, caught_by, judged):
    got = verdict(FAULTS[0], subprocess.CompletedProcess([], code, stdout=output))
    assert got.caught_by == caught_by
    assert (got.error is None) is judged


@pytest.mark.slow
def test_a_fault_in_a_copy(tmp_path):
    """A fault is planted, caught and removed."""
    fault = next(f for f in FAULTS if f.file == "rewardops/core/rows.py")
    source = (ROOT / fault.file).read_text()
    copy = Copy(tmp_path)
    copy.must_pass([fault])
    got = copy.judge(fault)
    assert got.caught_by == "tests/system/test_layout.py::test_expand_spreads_rows_over_both_layouts", (
        got.error
    )
    assert (copy.root / fault.file).read_text() == source
