"""The C++ module on AArch64, in an emulator: every op within its budget, with the same bits in every run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import aarch64
import pytest

from rewardops.core.native import compiled_module

TOOLS = Path(aarch64.__file__).parent

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(aarch64.why_not() is not None, reason=str(aarch64.why_not())),
]

# Every call of `rewardops.testing` in every precision, against the reference in float64, forward and backward.
CODE = """
import json
import aarch64
remote = aarch64.load()
import torch
import rewardops as R
from rewardops.core.families import FAMILIES
from rewardops.testing import assert_within_budget
from rewardops.testing.calls import calls, make_batch
from rewardops.testing.verify import Case, Truth, check_call
assert remote.call("isa", ()) == "portable"
shape = {"rows": 12, "width": 33, "vocab": 130, "poison": True}
cases = [
    Case("float32", torch.float32, shape | {"layout": "padded"}),
    Case("float64", torch.float64, shape | {"layout": "packed"}),
    Case("bfloat16", torch.bfloat16, shape | {"layout": "packed"}),
    Case("float16", torch.float16, shape | {"layout": "padded"}),
]
truth, rows = Truth(), []
for family in FAMILIES:
    for name in [call.name for call in calls(make_batch(), family)]:
        rows.append(check_call(family, name, "cpp", "cpu", cases, truth, set(), quick=True, compiles=False))
# Tokens of 32 bits. Rows so long that a few of them are cut into chunks, and many are not.
batch = make_batch()
lcp = [R.prefix_lcp(tokens, batch.groups, mask=batch.mask)[1] for tokens in (batch.tokens.int(), batch.tokens)]
assert torch.equal(*lcp)
for fn in (lambda x: R.gae(x, x.cos(), gamma=0.99, lam=0.95)[0], R.min_returns):
    few = torch.randn(1, 70_000, generator=torch.Generator().manual_seed(0)).requires_grad_()
    many = few.detach().repeat(17, 1).requires_grad_()
    fn(few).sin().sum().backward()
    fn(many).sin().sum().backward()
    assert_within_budget(fn(few)[0], fn(many)[0])
    assert_within_budget(few.grad[0], many.grad[0])
faults = [f"{row.name}: {fault}" for row in rows for fault in row.faults]
print(json.dumps({"rows": len(rows), "faults": faults, "called": remote.calls}))
"""


def test_every_op_is_within_its_budget():
    aarch64.build()
    done = subprocess.run([sys.executable, "-c", CODE], cwd=TOOLS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-500:] + done.stderr[-5000:]
    found = json.loads(done.stdout)
    assert found["rows"] > 60
    assert not found["faults"]
    functions = {name for name in dir(compiled_module()) if not name.startswith("_")}
    assert set(found["called"]) == functions - {"cuda", "prefer_huge_pages", "use_team"}
