"""Threads and processes: concurrent calls, forks, data loaders, the number of threads, concurrent builds."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import rewardops
from rewardops.core import dispatch, native
from rewardops.testing import calls

ROOT = Path(__file__).resolve().parents[2]
needs_cpp = pytest.mark.skipif(native.compiled_module() is None, reason="the compiled module was not built")


def both_ways(call):
    """Outputs and gradients of a call, checked to have no NaN."""
    xs = [x.detach().clone().requires_grad_() for x in call.inputs]
    outputs = call.fn(*xs)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else [o for o in outputs if o is not None]
    smooth = [o for o in outputs if o.requires_grad]
    ups = [o.detach().cos() for o in smooth]
    grads = torch.autograd.grad(smooth, xs, ups, allow_unused=True) if smooth else ()
    return [t.detach().nan_to_num(7) for t in (*outputs, *grads) if t is not None]


def same(found, wanted):
    return all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def large_calls(layout):
    """Calls large enough for several threads; without matmuls, whose bits and threads are the vendor's."""
    batch = calls.make_batch(96, 200, 32, layout=layout, dtype=torch.float32)
    return [call for call in calls.calls(batch) if not call.op.startswith("linear")]


# ---- threads -----------------------------------------------------------------------------------------------


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@needs_cpp
@pytest.mark.parametrize("layout", calls.LAYOUTS)
def test_the_number_of_threads_does_not_show(layout, restored_threads):
    for call in large_calls(layout):
        torch.set_num_threads(1)
        want = both_ways(call)
        torch.set_num_threads(2)
        assert same(both_ways(call), want), call.name


@needs_cpp
def test_threads_at_once():
    """Every thread calls every op, forward and backward, each starting at a different op."""
    batch_calls = large_calls("packed")
    want = [both_ways(call) for call in batch_calls]

    def work(first):
        order = [(first + k) % len(batch_calls) for k in range(len(batch_calls))]
        return [batch_calls[k].name for k in order if not same(both_ways(batch_calls[k]), want[k])]

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, (0, 20, 40))) == [[], [], []]


def test_use_backend_is_of_the_process():
    """The context holds on every thread; the last one opened wins, whatever the order of closing."""
    default, served = dispatch.backend_for("cpu"), []
    opened, closed = threading.Event(), threading.Event()

    def work():
        with rewardops.use_backend("triton,reference"):
            served.append(dispatch.backend_for("cpu"))
            opened.set()
            closed.wait(10)

    other = threading.Thread(target=work)
    with rewardops.use_backend("reference"):
        other.start()
        assert opened.wait(10)
        assert dispatch.backend_for("cpu") == served[0] == "triton"
    assert dispatch.backend_for("cpu") == "triton"
    closed.set()
    other.join()
    assert dispatch.backend_for("cpu") == default


# In a separate process without threads; only the kernel runs between two counts, as torch's loops start # threads
# too.
COUNT_THREADS = """
import os, sys, torch
from rewardops.core import dispatch, native
from rewardops.reference.kl import TokenKlArgs

module = native.compiled_module()
if sys.argv[1] == "pool":
    module.use_team(0)
token_kl = dispatch._implementation("cpp", "kl", "token_kl")
torch.set_num_threads(1)
x = torch.full((2**18,), 0.5)
def started(threads):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    token_kl(TokenKlArgs(x, x, None, None, None, "k3", 20.0, 10.0, 1.0, False, float("inf")))
    return len(os.listdir("/proc/self/task")) - before
print([started(n) for n in (1, 3, 5)])
"""


@needs_cpp
@pytest.mark.parametrize("threads", ["torch", "pool"])
def test_set_num_threads(threads):
    """A loop uses exactly the number of threads of torch, including the caller."""
    out = run_python(COUNT_THREADS, threads)
    assert out.strip() == "[0, 2, 2]"


def run_python(code, *arguments, **options):
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---- forks -------------------------------------------------------------------------------------------------

FORK = """
import os, torch, rewardops
from rewardops.core import dispatch, native
torch.set_num_threads(2)
logits, tokens = torch.randn(64, 5000, requires_grad=True), torch.zeros(64, dtype=torch.long)

def run():  # no loop of torch's that is long enough for its threads: that would hang in a child
    stats = rewardops.token_stats(logits, tokens)
    return torch.autograd.grad((stats.logprob + stats.entropy).sum(), logits)[0]

def forked():
    pid = os.fork()
    if pid:
        assert os.waitpid(pid, 0)[1] == 0
        return
    run()
    grandchild = os.fork()
    if grandchild == 0:
        run()
    elif os.waitpid(grandchild, 0)[1]:
        os._exit(1)
    os._exit(0)

forked()                                            # nothing has run yet
torch.randn(2000, 2000).exp_()                      # torch has started its threads
forked()
want = run()                                        # and here they have run our loops
forked()
assert torch.equal(run(), want)
"""


@needs_cpp
def test_forks():
    """A forked child computes, forward and backward, even after OpenMP use (whose runtime would hang)."""
    run_python(FORK)


class Rollouts(Dataset):
    """Rows whose samples call ops, in the workers of a data loader."""

    def __len__(self):
        return 6

    def __getitem__(self, index):
        rewards = torch.linspace(index, index + 1, 2000).view(40, 50)
        return rewardops.discounted_returns(rewards, gamma=0.9)


def collated(samples):
    rows = torch.stack([rewardops.min_returns(s) for s in samples])
    logprob = rewardops.token_stats(
        rows.flatten(0, 1), torch.zeros(rows[..., 0].numel(), dtype=torch.long)
    ).logprob
    return rows, logprob


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_data_loader_workers(how):
    rewardops.discounted_returns(torch.rand(400, 500))  # uses torch's threads before any worker exists
    want = list(DataLoader(Rollouts(), 3, collate_fn=collated))
    loader = DataLoader(
        Rollouts(),
        3,
        collate_fn=collated,
        num_workers=1 + (how == "fork"),
        multiprocessing_context=how,
        timeout=300,
    )
    got = list(loader)
    assert len(got) == len(want) == 2
    for a, b in zip(got, want, strict=True):
        assert same(a, b)


# ---- two builds at once ------------------------------------------------------------------------------------

# A fake compiler or cmake: logs its start and end, and writes its output slowly.
TOOL = """#!/bin/sh
echo "start $*" >> {log}
out=/dev/null
while [ $# -gt 0 ]; do
  case "$1" in
    -o) out="$2"; shift ;;
    -DREWARDOPS_MODULE_DIR=*) mkdir -p {state}; echo "${{1#*=}}" > {state}/module_dir ;;
    --build) mkdir -p "$(cat {state}/module_dir)"; out="$(cat {state}/module_dir)/{module}" ;;
  esac
  shift
done
sleep 0.3
echo made > "$out"
echo end >> {log}
"""


def make_tool(path, log, module=""):
    path.parent.mkdir(exist_ok=True)
    path.write_text(TOOL.format(log=log, state=path.parent / "state", module=module))
    path.chmod(0o755)


def assert_one_after_the_other(log):
    words = [line.split()[0] for line in log.read_text().splitlines()]
    assert words == ["start", "end"] * (len(words) // 2)
    return len(words) // 2


def test_cuda_on_host_is_built_once(tmp_path):
    """Of processes that build at once, the first compiles and the others reuse its result."""
    log, source = tmp_path / "log", tmp_path / "kernel.cu"
    make_tool(tmp_path / "bin" / "c++", log)
    source.touch()
    code = (
        "import sys; from pathlib import Path; from cuda_on_host import build\n"
        "root = Path(sys.argv[1])\n"
        "build.ROOT, build.HERE, build.COMPILER = root, root, str(root / 'bin' / 'c++')\n"
        "build._sources = lambda: [root / 'kernel.cu']\n"
        "print(build.build())"
    )
    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(run_python, code, str(tmp_path), cwd=ROOT / "tests") for _ in range(3)]
        (module,) = {job.result() for job in jobs}
    assert Path(module.strip()).read_text() == "made\n"
    assert assert_one_after_the_other(log) == 2  # an object, a module
    assert not list(Path(module.strip()).parent.glob("*.tmp"))


def test_builds_of_a_checkout_wait_for_each_other(tmp_path):
    """Builds share the build folder, so they run one after another."""
    checkout, log = tmp_path / "checkout", tmp_path / "log"
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        (checkout / "rewardops").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, checkout)
    (checkout / "triton_kernels").mkdir()
    for package in ("rewardops", "triton_kernels"):
        (checkout / package / "__init__.py").write_text('__version__ = "0"\n')
    code = "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"
    module = "_C" + run_python(code).strip()
    make_tool(tmp_path / "bin" / "cmake", log, module)
    env = {**os.environ, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    builds = [subprocess.Popen(command, cwd=checkout, env=env, stderr=subprocess.PIPE) for _ in range(2)]
    for build in builds:
        _, errors = build.communicate(timeout=300)
        assert build.returncode == 0, errors.decode()[-3000:]
    assert assert_one_after_the_other(log) == 4  # each configures and builds
    assert (checkout / "rewardops" / module).read_text() == "made\n"
    assert not list(checkout.rglob("*.tmp"))
