"""Pairs of eager code and ops in the documentation agree; the site builds without a warning, and is whole."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zlib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import rewardops
from rewardops.core.families import FAMILIES

ROOT = Path(__file__).resolve().parents[2]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", text, flags=re.M | re.S)


HEAD, *SECTIONS = re.split(r"^## ", (ROOT / "docs" / "from_eager.md").read_text(), flags=re.M)
(INPUTS,) = blocks(HEAD)
each_pair = pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.split("\n")[0])


def assigned(code: str, nan_behind_mask: bool = False) -> dict[str, torch.Tensor]:
    """The tensors that a block assigns; tokens that do not count are 0 or False."""
    scope: dict = {}
    exec(INPUTS, scope)
    mask = scope["mask"]
    if nan_behind_mask:
        for x in list(scope.values()):
            if isinstance(x, torch.Tensor) and x.is_floating_point() and x.shape[:2] == mask.shape:
                x[~mask] = torch.nan
    before = dict(scope)
    exec(code, scope)
    return {k: v for k, v in scope.items() if isinstance(v, torch.Tensor) and before.get(k) is not v}


class Test_pairs:
    def test_there_are_some(self):
        assert len(SECTIONS) >= 12
        assert all(len(blocks(section)) == 2 for section in SECTIONS)

    @each_pair
    def test_eager_code_and_ops_agree(self, section):
        eager, ops = map(assigned, blocks(section))
        common = eager.keys() & ops.keys()
        assert common
        mask = assigned(INPUTS)["finished" if "finished" in section else "mask"]
        for name in common:
            want, got = eager[name], ops[name]
            if want.shape == mask.shape:
                want, got = torch.where(mask, want, 0), torch.where(mask, got, 0)
            torch.testing.assert_close(got, want)

    @each_pair
    def test_nan_behind_the_mask(self, section):
        eager, ops = blocks(section)
        clean = assigned(ops)
        for name, got in assigned(ops, nan_behind_mask=True).items():
            torch.testing.assert_close(got, clean[name], rtol=0, atol=0)
        if "NaN behind the mask" in section:
            assert any(x.isnan().any() for x in assigned(eager, nan_behind_mask=True).values())


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built with warnings as errors."""
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", out / "doctrees", "docs"]
    done = subprocess.run([*command, out / "html"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-8000:]
    return out / "html"


@pytest.mark.slow
@pytest.mark.skipif(
    not all(map(find_spec, ("sphinx", "furo", "myst_parser"))), reason="the extra `docs` is not installed"
)
class Test_site:
    def test_every_public_name_has_a_place(self, site):
        inventory = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
        places = dict(
            re.findall(r"^(\S+) py:\w+ -?\d+ (\S+)", zlib.decompress(inventory).decode(), flags=re.M)
        )
        assert not {name for name in rewardops.__all__ if f"rewardops.{name}" not in places}
        for name in FAMILIES:
            family = __import__(f"rewardops.{name}", fromlist=["__all__"])
            for x in family.__all__:
                path = f"rewardops.{x}" if x in rewardops.__all__ else f"rewardops.{name}.{x}"
                assert places[path].startswith(f"api/{name}.html"), path

    def test_the_picture_of_the_readme(self, monkeypatch):
        monkeypatch.syspath_prepend(ROOT / "docs" / "_extensions")
        assert (ROOT / "docs" / "prefix_tree.svg").read_text() == importlib.import_module("pictures").tree()

    def test_pictures_are_drawn(self, site):
        page = (site / "gallery.html").read_text()
        assert page.count("<svg xmlns") >= 1
        assert page.count("srcdoc=") == 3

    def test_every_page_is_reached_from_the_first(self, site):
        seen, todo = set(), [site / "index.html"]
        while todo:
            page = todo.pop()
            if page in seen or not page.exists():
                continue
            seen.add(page)
            hrefs = re.findall(r'href="([^"#:]+\.html)', page.read_text())
            todo += [(page.parent / href).resolve() for href in hrefs]
        pages = {p.relative_to(ROOT / "docs").with_suffix(".html") for p in (ROOT / "docs").rglob("*.md")}
        assert not {page for page in pages if (site / page).resolve() not in seen}


# ---- docs/needs.md -------------------------------------------------------------------------------------------

NEEDS, NOT_HERE = (ROOT / "docs" / "needs.md").read_text().split("Not here, and why:")
LINES = re.findall(r"^\| (.+?) \| `(.+)` \|$", NEEDS, flags=re.M)
# What from_eager.md has no use for.
MORE = """
old_logprob = logprob + 0.1 * torch.randn(B, T)
advantages = token_rewards
several_rewards = torch.rand(B, 2)
baseline = torch.zeros(B)
by_the_book = lambda x, *_: x.logsumexp(-1)
my_kernel = lambda x, *_: by_the_book(x.to(torch.promote_types(x.dtype, torch.float32)))
parent, leaf_rewards = torch.tensor([-1, 0, 0]), torch.tensor([0.0, 1.0, 0.0])
"""


class Test_needs:
    def test_there_are_some(self):
        assert len(LINES) >= 30
        assert len(re.findall(r"^\| .+ \| .+ \|$", NEEDS, flags=re.M)) == len(LINES) + 1
        assert len({code for _, code in LINES}) == len(LINES)

    @pytest.mark.parametrize("code", [code for _, code in LINES])
    def test_line_runs(self, code):
        scope: dict = {}
        exec(INPUTS + MORE, scope)
        assert eval(code, scope) is not None
