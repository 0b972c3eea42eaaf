"""``python -m benchmarks``: time the ops on this machine."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from . import cases, memory, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--case", action="append", choices=cases.NAMES, help="only this case (repeatable)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--full", action="store_true", help="N=8192, V=151936, B=1024, T=8192 (for GPUs)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--keep-memory", action="store_true", help="on a CPU: do not return freed memory")
    parser.add_argument("--out", type=Path, help="write the report as JSON")
    options = parser.parse_args()
    if options.keep_memory and not memory.keep():
        parser.error("--keep-memory: the C library here has no mallopt")
    report = run.run_all(
        options.case or cases.NAMES,
        cases.FULL if options.full else cases.CPU,
        torch.device(options.device),
        compiled=not options.no_compile,
    )
    report["keep_memory"] = options.keep_memory
    print("\n" + run.markdown(report))
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
