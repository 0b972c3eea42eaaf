"""The scripts in `examples/` that need training frameworks run as they are."""

from __future__ import annotations

import example_scripts
import pytest


@pytest.mark.parametrize("name", example_scripts.PRINTED["integrations"])
def test_example(name, tmp_path):
    example_scripts.run(name, "integrations", tmp_path)
