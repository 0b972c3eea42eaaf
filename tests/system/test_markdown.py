"""The Python blocks of the documents run as they stand, each in one place or another."""

from __future__ import annotations

import markdown_blocks
import pytest
from markdown_blocks import FENCES, PLACES, ROOT, blocks, documents, files, script


@pytest.mark.parametrize("file", files("system"))
def test_blocks_run(file, tmp_path):
    markdown_blocks.run(file, "system", tmp_path)


def test_every_block_runs_somewhere():
    """In a place that there is, and none is written so that it is overlooked."""
    run = {(file, block.line) for place in PLACES for file in files(place) for block in here(file, place)}
    assert len(run) > 10
    for path in documents():
        text, name = path.read_text(), path.relative_to(ROOT).as_posix()
        found = blocks(text)
        assert {block.place for block in found} <= set(PLACES), name
        assert {(name, block.line) for block in found} <= run
        assert sum(text.splitlines()[b.line - 1].strip() == "```python" for b in found) == len(
            FENCES.findall(text)
        )


def here(file: str, place: str):
    return [b for b in blocks((ROOT / file).read_text()) if place in ("integrations", b.place)]


DOCUMENT = """
```python
a = 1
```

- In a list:

  <!-- run in: integrations -->
  <!-- before the next block:
  b = 2
  -->

  ```python
  if a:
      c = b
  ```

```text
not run
```

<!-- a remark -->
```python
d = a
```
"""


def test_blocks_are_run_at_their_lines():
    assert [block.place for block in blocks(DOCUMENT)] == ["system", "integrations", "integrations", "system"]
    lines = DOCUMENT.splitlines()
    for place, wanted in (("system", 2), ("integrations", 5)):
        kept = [(k, line) for k, line in enumerate(script(DOCUMENT, place).splitlines()) if line]
        assert len(kept) == wanted
        assert all(lines[k].strip() == line.strip() for k, line in kept)
    scope: dict = {}
    exec(script(DOCUMENT, "integrations"), scope)
    assert (scope["c"], scope["d"]) == (2, 1)


@pytest.mark.parametrize(
    "fence", ["```py", "``` python", "~~~python", "```Python", "   ```python3", "```{.python}"]
)
def test_other_spellings_of_a_block_are_seen(fence):
    assert FENCES.findall(f"\n{fence}\nx\n")
    assert not FENCES.findall("\n```text\npython\n```\npython\n")
