"""``python -m benchmarks.curves``: what prefix trees cost by the size of groups and what their rows share."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

import rewardops

from . import cases, memory, run, timing

ROWS, LENGTH, VOCAB = 1024, 2048, 151936
GROUPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
SHARED = (0, 16, 64, 128, 256, 512, 1024, 2048)
USUAL = {"group": 8, "shared": 200}
EAGER_UP_TO = 128  # rows of a group: a pass over all tokens for each
VARIANTS = ("prefix_values", "tempo_advantages", "the tree alone", "eager", "dictionary trie")


def point(device: torch.device, group: int, shared: int, seconds: float) -> dict[str, Any]:
    """Milliseconds of each variant at one size."""
    g = torch.Generator(device).manual_seed(0)
    x, mask, rewards = cases.shared_prefixes(ROWS, LENGTH, group, shared, VOCAB, g, device)
    labels = torch.arange(ROWS, device=device) // group
    calls = {
        "prefix_values": lambda: rewardops.prefix_values(x, rewards, group_size=group, mask=mask),
        "tempo_advantages": lambda: rewardops.tempo_advantages(x, rewards, group_size=group, mask=mask),
        "the tree alone": lambda: torch.ops.rewardops.prefix_tree(x, labels, mask, None, False),
        "dictionary trie": lambda: cases.trie_prefix_values(x, rewards, mask, group),
    }
    if group <= EAGER_UP_TO:
        calls["eager"] = lambda: cases.plain_prefix_values(x, rewards, mask, group)
    if device.type != "cpu":
        del calls["dictionary trie"]
    found = timing.interleaved(calls, device, runs=11, seconds=seconds)
    tree = rewardops.PrefixTree.from_tokens(x, group_size=group, mask=mask).dedup_stats()
    return {
        "group": group,
        "shared": shared,
        "saved": tree.saved,
        "ms": {name: t.median for name, t in found.items()},
    }


def measure(device: torch.device, seconds: float = 4.0) -> dict[str, Any]:
    """Both curves, with the machine."""
    groups = [point(device, k, USUAL["shared"], seconds) for k in GROUPS]
    shared = [point(device, USUAL["group"], s, seconds) for s in SHARED]
    return {
        "machine": run.machine(device),
        "rows": ROWS,
        "length": LENGTH,
        "group": groups,
        "shared": shared,
    }


def plot(found: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "rewardops"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
    names = {"group": "rows of a group", "shared": "mean shared tokens of a branch"}
    for axis, (by, label) in zip(axes, names.items(), strict=True):
        for k, variant in enumerate(VARIANTS):
            points = [(p[by], p["ms"][variant]) for p in found[by] if variant in p["ms"]]
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3.5, color=f"C{k}", label=variant)
        axis.set_xlabel(label)
        axis.set_xscale("symlog" if by == "shared" else "log", base=2)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds")
    axes[0].legend(fontsize=8)
    m = found["machine"]
    where = m.get("gpu") if m.get("gpu", "none") != "none" else m.get("cpu")
    title = (
        f"{found['rows']} rows of up to {found['length']} tokens; {where}, torch {m['torch']}, {m['date']}"
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.curves", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--out", type=Path, required=True, help="the plot (SVG); the numbers go beside it as JSON"
    )
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        memory.keep()
    found = measure(device)
    options.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    plot(found, options.out)
    for by in ("group", "shared"):
        for p in found[by]:
            print(by, p[by], f"{p['saved']:.1%}", {k: round(v, 3) for k, v in p["ms"].items()})


if __name__ == "__main__":
    main()
