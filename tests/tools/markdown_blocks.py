"""The Python blocks of the documents, run as a reader runs them: a file's blocks in order, as one script.

A block runs in `tests/system/test_markdown.py`. Above a block may be comments, which no page shows:
`<!-- run in: integrations -->` for one that needs a training framework, which
`tests/integrations/test_markdown_of_frameworks.py` runs after the blocks before it; and
`<!-- before the next block:` with code to run first, up to `-->`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("system", "integrations")
# What a script may need beyond the package; without it the script is not run.
PACKAGES = ("triton", "transformers", "trl", "verl", "torchrl")
# Any block of code whose language is Python, however it is written.
FENCES = re.compile(r"^[ \t]*(?:```+|~~~+)[ \t]*\{?[ \t]*\.?py", re.M | re.I)
COMMENT = r"[ ]*<!--(?:(?!-->)[\s\S])*-->[ ]*\n+"
BLOCK = re.compile(
    rf"^(?P<comments>(?:{COMMENT})*)(?P<indent>[ ]*)```python\n(?P<code>[\s\S]*?)^(?P=indent)```$", re.M
)
PLACE = re.compile(r"<!-- run in: (.*?) -->")
BEFORE = re.compile(r"<!-- before the next block:\n(?P<code>[\s\S]*?)-->")


class Block(NamedTuple):
    """Code with the number of its first line, from 0, and the place where it runs."""

    line: int
    code: str
    place: str


def documents() -> list[Path]:
    """The documents of the project."""
    found = [
        *ROOT.glob("*.md"),
        *(path for folder in ("docs", "examples") for path in (ROOT / folder).rglob("*.md")),
    ]
    return sorted(found)


def blocks(text: str) -> list[Block]:
    """The blocks of a document, and the code that comments add to them, in order."""
    found = []
    for match in BLOCK.finditer(text):
        places = PLACE.findall(match["comments"]) or ["system"]
        for part, start in [(m, match.start()) for m in BEFORE.finditer(match["comments"])] + [(match, 0)]:
            line = text.count("\n", 0, start + part.start("code"))
            found.append(Block(line, part["code"], places[-1]))
    return found


def files(place: str) -> list[str]:
    """The documents with a block that runs in a place."""
    with_one = (path for path in documents() if any(b.place == place for b in blocks(path.read_text())))
    return [path.relative_to(ROOT).as_posix() for path in with_one]


def script(text: str, place: str) -> str:
    """The blocks of a document that run in a place, each at its own lines, so that errors show the document's."""
    lines = [""] * (text.count("\n") + 1)
    for block in blocks(text):
        if place == "integrations" or block.place == place:
            code = textwrap.dedent(block.code).splitlines()
            lines[block.line : block.line + len(code)] = code
    return "\n".join(lines) + "\n"


def run(file: str, place: str, folder: Path) -> None:
    """Run the blocks of a document in an empty folder, in a process of their own."""
    path = folder / f"{Path(file).stem}.md.py"
    path.write_text(script((ROOT / file).read_text(), place))
    run_script(path, folder)


def run_script(path: Path, folder: Path, timeout: float = 300) -> str:
    """Run a script in a folder as from a shell, without a network; return what it prints."""
    named = (package for package in PACKAGES if re.search(rf"\b{package}\b", path.read_text()))
    if missing := [package for package in named if find_spec(package) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    environment = {
        # What a test sets for itself, a script has to set.
        **{name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        # What comes before a block may use the examples.
        "PYTHONPATH": os.pathsep.join([str(ROOT / "examples"), os.environ.get("PYTHONPATH", "")]).strip(os.pathsep),
        "HF_HUB_OFFLINE": "1", "HTTP_PROXY": "http://127.0.0.1:9", "HTTPS_PROXY": "http://127.0.0.1:9",
        "OMP_NUM_THREADS": "1", "TMPDIR": str(folder),
    }  # fmt: skip
    command = [sys.executable, str(path)]
    found = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert found.returncode == 0, f"{path.name}:\n{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return found.stdout
