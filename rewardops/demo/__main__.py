"""``python -m rewardops.demo``: train a small policy with the ops in the loop, or draw rollouts from a file."""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

import rewardops

from ..core import dispatch
from ..recipes import RECIPES
from . import task, train
from .report import Group, chart, groups_section, page, table
from .rollouts import BadRollouts
from .rollouts import report as rollouts_report


def _progress(items: Iterable[int], name: str) -> Iterable[int]:
    try:
        from tqdm import tqdm
    except ImportError:
        print(f"{name} (progress bars: pip install 'rewardops[demo]')", file=sys.stderr)
        return items
    return tqdm(items, desc=f"{name:>8}", unit="step", leave=True, mininterval=0.5)


def _write(folder: Path, html: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "index.html"
    path.write_text(html, encoding="utf-8")
    return path


def _columns(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(r[k]) for r in [head, *rows]) for k in range(len(head))]
    return "\n".join(
        "  ".join(cell.rjust(w) for cell, w in zip(r, widths, strict=True)) for r in [head, *rows]
    )


def _pieces(result: train.Result) -> list[list[str]]:
    return [[task.SYMBOLS[i] for i in row] for row in result.sample.tokens.tolist()]


def run_training(options: argparse.Namespace) -> None:
    s = train.QUICK if options.quick else train.Settings()
    s = dataclasses.replace(s, seed=options.seed)
    if options.updates is not None:
        s = dataclasses.replace(s, updates=options.updates)
    if options.group_size is not None:
        s = dataclasses.replace(s, group_size=options.group_size)
    recipes = list(RECIPES) if options.compare else [options.recipe]
    start = time.perf_counter()
    held_out = task.problems(s.held_out, s.digits, 7, held_out=True)
    policy, before = train.warm_up(s, held_out, _progress)
    results = [train.reinforce(policy, r, s, held_out, before, _progress) for r in recipes]
    total = time.perf_counter() - start

    head = ("recipe", "accuracy before", "after", "change", "ops, s", "model, s", "sampling, s", "ops share")
    rows = []
    for r in results:
        seconds = r.clock.seconds
        share = seconds["ops"] / (seconds["ops"] + seconds["model"])
        rows.append(
            (
                r.recipe, f"{r.before:.1%}", f"{r.after:.1%}", f"{100 * (r.after - r.before):+.1f} points",
                f"{seconds['ops']:.2f}", f"{seconds['model']:.2f}", f"{seconds['sampling']:.2f}", f"{share:.1%}",
            )
        )  # fmt: skip
    backend = dispatch.backend_for("cpu")
    lead = (
        f"Addition of {s.digits}-digit numbers with worked columns; {s.updates} updates of {s.prompts} groups of"
        f" {s.group_size}; accuracy is greedy, on {s.held_out} held-out problems. Seed {s.seed}, {total:.0f} s in all,"
        f" rewardops {rewardops.__version__} on the {backend} backend, torch {torch.__version__},"
        f" {torch.get_num_threads()} threads. The ops' seconds are theirs forward and backward, loss included."
    )
    names = list(results[0].curves)
    charts = [
        chart(name, {r.recipe: r.curves[name] for r in results}, 1.0 if "entropy" not in name else None)
        for name in names
    ]
    groups = [
        Group(
            f"{r.recipe}: a group of the trained policy on {r.problem.prompt[:-1]} = {r.problem.a + r.problem.b}",
            r.sample,
            _pieces(r),
            {
                name: credit(r.sample)
                for name, credit in RECIPES.items()
                if name == r.recipe or options.compare
            },
            r.logprob,
        )
        for r in results[:1]
    ]
    path = _write(
        options.out,
        page(
            "rewardops: a policy trained with the ops in the loop", lead, table(head, rows),
            f'<h2>Learning</h2><div class="charts">{"".join(charts)}</div>', groups_section(groups),
        ),
    )  # fmt: skip
    print("\n" + _columns(head, rows))
    print(f"\n{lead}\nreport: {path}")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m rewardops.demo", description=__doc__)
    parser.add_argument("--recipe", choices=list(RECIPES), default="grpo", help="credit assignment (grpo)")
    parser.add_argument("--compare", action="store_true", help="all recipes from the same warm start")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--updates", type=int, help="reinforcement updates")
    parser.add_argument("--group-size", type=int, help="responses sampled per problem")
    parser.add_argument("--quick", action="store_true", help="a run of seconds, too short to learn")
    parser.add_argument(
        "--out", type=Path, default=Path("demo_report"), help="folder of the report (demo_report)"
    )
    parser.add_argument(
        "--rollouts", type=Path, metavar="FILE.jsonl", help="draw these rollouts instead of training"
    )
    parser.add_argument("--group", action="append", default=[], help="a group to draw (repeatable)")
    parser.add_argument("--groups", type=int, default=4, help="how many to choose where none is named (4)")
    options = parser.parse_args(arguments)
    for name in ("updates", "group_size", "groups"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: got {value}, want at least 1")
    if options.rollouts is None:
        run_training(options)
        return 0
    try:
        html, lines = rollouts_report(options.rollouts, options.group, options.groups)
    except BadRollouts as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    print(f"report: {_write(options.out, html)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
