"""The Python blocks of the documents that need training frameworks."""

from __future__ import annotations

import markdown_blocks
import pytest


@pytest.mark.parametrize("file", markdown_blocks.files("integrations"))
def test_blocks_run(file, tmp_path):
    markdown_blocks.run(file, "integrations", tmp_path)
