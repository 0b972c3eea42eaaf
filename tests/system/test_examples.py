"""The scripts in `examples/` run as they are; those that need a training framework, in `tests/integrations`."""

from __future__ import annotations

import re

import example_scripts
import pytest
from example_scripts import PRINTED, ROOT

FILES = {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("name", PRINTED["system"])
def test_example(name, tmp_path):
    example_scripts.run(name, "system", tmp_path)


def test_every_example_is_run():
    assert sorted(name for scripts in PRINTED.values() for name in scripts) == sorted(FILES)


def test_every_example_is_in_the_table_and_says_what_it_is():
    listed = re.findall(
        r"^\| \[`(\w+\.py)`\]\((\w+\.py)\) \|", (ROOT / "examples" / "README.md").read_text(), re.M
    )
    assert {name for name, _ in listed} == {file for _, file in listed} == FILES
    for name in FILES:
        text = (ROOT / "examples" / name).read_text()
        assert re.match(r'"""[^\n]+\.\n\nShows: [\s\S]+?\nNeeds: [\s\S]+?\nTakes: ', text), name
        assert 40 <= text.count("\n") <= 120, name
