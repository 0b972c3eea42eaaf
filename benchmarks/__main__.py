"""``python -m benchmarks run|compare|report|readme|list``: time the ops and report the results."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from . import case, cases, compare, memory, readme, report, run


def _named(chosen: list[str] | None) -> list[str]:
    """The names of the chosen cases; a family stands for all of its cases."""
    selected = []
    for name in chosen or cases.families():
        if name not in cases.names() and name not in cases.families():
            raise run.Refused(f"--case: no case or family {name!r}; python -m benchmarks list has them")
        selected += [name] if name in cases.names() else cases.names(name)
    return list(dict.fromkeys(selected))


def _run(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    keeps = device.type == "cpu" and not options.return_memory
    settings = run.Settings(
        device=options.device,
        sizes=options.sizes,
        runs=options.runs,
        seconds=options.seconds or (1.0 if options.sizes == "quick" else 4.0),
        compiled=not options.no_compile,
        backends=tuple(options.backends),
        keep_memory=keeps and memory.keep(),
    )
    if keeps and not settings.keep_memory:
        print(
            "the C library here cannot be told to keep memory: every large result is fetched from the system"
        )
    items = run.plan(_named(options.case), options.sizes, options.sweep)
    try:
        from tqdm import tqdm
    except ImportError:
        done = run.run_all(items, settings, out=options.out, fresh=options.fresh)
    else:
        bar = tqdm(items, disable=None, unit="case")
        done = run.run_all(bar, settings, out=options.out, fresh=options.fresh, say=tqdm.write)
    print("\n" + report.markdown(done))
    return 0


def _compare(options: argparse.Namespace) -> int:
    before, after = run.load(options.before), run.load(options.after)
    if (apart := compare.different(before, after)) and not options.anyway:
        print(f"not compared: another {', '.join(apart)} (--anyway compares all the same)")
        return 2
    text, regressions = compare.compare(before, after)
    print(text, end="")
    return 1 if regressions else 0


def _report(options: argparse.Namespace) -> int:
    options.out.mkdir(parents=True, exist_ok=True)
    for path in options.reports:
        loaded = run.load(path)
        (options.out / f"{path.stem}.md").write_text(report.markdown(loaded))
        print(options.out / f"{path.stem}.md")
        try:
            from . import plots

            pictures = plots.all_of(loaded, options.out, path.stem)
        except ImportError:
            print("no plots: matplotlib is not installed (benchmarks/requirements.txt)")
        else:
            print(*pictures, sep="\n")
    return 0


def _readme(options: argparse.Namespace) -> int:
    print(*readme.rewrite(), sep="\n")
    return 0


def _list(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    for family in cases.families():
        print(family)
        for name in cases.names(family):
            kinds = ", ".join(run.dtype_name(dtype) for dtype in cases.dtypes(name))
            print(f"  {name} ({kinds}); sweeps: {', '.join(cases.axes(name)) or 'none'}")
            for peer, fn in cases.make(name, case.TINY, device).peers.items():
                print(f"    {peer}" + (f": {fn.why}" if isinstance(fn, case.Missing) else ""))
    return 0


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(required=True)

    def command(name: str, function: object, about: str) -> argparse.ArgumentParser:
        subparser = commands.add_parser(name, help=about, description=about)
        subparser.set_defaults(function=function)
        return subparser

    on = {"default": "cuda" if torch.cuda.is_available() else "cpu", "help": "cpu or cuda"}
    p = command("run", _run, "time cases on this machine")
    p.add_argument("--case", action="append", help="a case, or all of a family (repeatable; default: all)")
    p.add_argument("--device", **on)
    size = p.add_mutually_exclusive_group()
    for name, about in (
        ("quick", "small, about a second a case"),
        ("full", "N=8192, V=151936, B=1024, T=8192 (for GPUs)"),
    ):
        size.add_argument(
            f"--{name}", dest="sizes", action="store_const", const=name, default="cpu", help=about
        )
    p.add_argument(
        "--sweep", action="append", default=[], metavar="AXIS", help="and over this (repeatable), or all"
    )
    p.add_argument(
        "--backends", nargs="+", default=[], metavar="NAME", help="ours on these too: reference cuda,triton"
    )
    p.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    p.add_argument("--seconds", type=float, help="for a case (4; 1 with --quick); slow variants take longer")
    p.add_argument("--runs", type=int, default=50, help="of a variant, at most")
    memories = p.add_mutually_exclusive_group()
    memories.add_argument(
        "--keep-memory", action="store_true", help="on a CPU, do not return freed memory: the default"
    )
    memories.add_argument(
        "--return-memory", action="store_true", help="on a CPU, return freed memory to the system"
    )
    p.add_argument("--out", type=Path, help="the report as JSON; a run that was stopped goes on from it")
    p.add_argument("--fresh", action="store_true", help="begin --out anew")

    p = command(
        "compare", _compare, "two reports; status 1 if ours became slower, 2 if they cannot be compared"
    )
    p.add_argument("before", type=Path)
    p.add_argument("after", type=Path)
    p.add_argument("--anyway", action="store_true", help="also where machine or settings differ")

    p = command("report", _report, "tables (Markdown) and plots (PNG) of reports")
    p.add_argument("reports", type=Path, nargs="+")
    p.add_argument("--out", type=Path, required=True, help="folder")

    command("readme", _readme, "rewrite README.md and the plots of docs/ from benchmarks/results/*.json")
    command(
        "list", _list, "the cases, what they can be swept over, and which other packages are missing"
    ).add_argument("--device", **on)
    return top


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["run", *arguments]
    options = parser().parse_args(arguments)
    try:
        return options.function(options)
    except run.Refused as error:
        parser().error(str(error))


if __name__ == "__main__":
    sys.exit(main())
