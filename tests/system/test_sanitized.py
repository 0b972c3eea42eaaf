"""The C++ module under the address and undefined behaviour sanitizers: fuzzed, and no report."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import sanitized

pytestmark = pytest.mark.slow
CALLS = os.environ.get("REWARDOPS_FUZZ_CALLS", "280")


@pytest.fixture(scope="module")
def module() -> Path:
    if why := sanitized.why_not():
        pytest.skip(why)
    return sanitized.build()


def test_no_report(module):
    size = ["--plain", "--max-width", "33", "--max-vocab", "129"]
    done = sanitized.run(module, "sanitized.py", "--calls", CALLS, *size, timeout=24 * 3600)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]
    assert "failed: none" in done.stdout
    assert "runtime error" not in done.stderr
    assert "Sanitizer" not in done.stderr


# The row lengths passed to row_sums are wrong by this many tokens, or bytes.
WRONG = """
import sanitized
sanitized.load()
import torch
from rewardops.core.dispatch import compiled_module
x, out = torch.ones(2, 24), torch.empty(2)
compiled_module().row_sums_f32((2, 24 + {tokens}, 0, 0, True), (0, 0), (x.data_ptr() + {bytes}, 24),
                                out.data_ptr(), 1)
print(out.tolist())
"""


@pytest.mark.parametrize(
    ("tokens", "bytes", "report"),
    [
        (0, 0, None),
        (1, 0, "AddressSanitizer: heap-buffer-overflow"),
        (-9, 1, "runtime error: load of misaligned address"),
    ],
    ids=["right", "a token too many", "a byte beside"],
)
def test_what_is_reported(module, tokens, bytes, report):
    done = sanitized.run(module, "-c", WRONG.format(tokens=tokens, bytes=bytes))
    if report is None:
        assert done.stdout == "[24.0, 24.0]\n"
        return
    assert done.returncode != 0
    assert report in done.stderr
    assert "row_sums" in done.stderr  # the stack
