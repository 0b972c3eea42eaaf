"""Rollouts from a JSON-lines file, and all credit assignments that their fields allow."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rewardops

from ..recipes import RECIPES, Rollouts
from .report import Group, groups_section, page, table

# Words with the space before them, single digits, single punctuation marks, and line breaks.
_PIECES = re.compile(r"\n| ?[^\W\d_]+| ?\d| ?[^\w\s]|_|[^\S\n]+")


class BadRollouts(ValueError):
    """A file that cannot be read as rollouts; the message names the line and the field."""


@dataclass(frozen=True)
class Row:
    """One response."""

    group: str
    reward: float
    pieces: list[str]
    ids: list[int]
    line_ends: list[int]
    step_rewards: list[float | None] | None
    logprobs: list[float] | None
    entropy: list[float] | None
    label: str


def _number(value: object, where: str) -> float:
    if isinstance(value, bool):
        return float(value)
    if not isinstance(value, (int, float)) or value != value or value in (float("inf"), float("-inf")):
        raise BadRollouts(f"{where}: got {value!r}, want a finite number")
    return float(value)


def _numbers(record: dict[str, Any], field: str, length: int, where: str) -> list[float] | None:
    value = record.get(field)
    if value is None:
        return None
    if not isinstance(value, list) or len(value) != length:
        came = f"{len(value)} entries" if isinstance(value, list) else type(value).__name__
        raise BadRollouts(f"{where}: {field}: got {came}, want a list of {length} numbers, one per token")
    return [_number(v, f"{where}: {field}") for v in value]


def _row(record: object, where: str, vocabulary: dict[str, int]) -> Row:
    if not isinstance(record, dict):
        raise BadRollouts(f"{where}: got {type(record).__name__}, want an object")
    for field in ("group", "reward"):
        if record.get(field) is None:
            raise BadRollouts(f"{where}: {field} is missing")
    reward = _number(record["reward"], f"{where}: reward")
    tokens, response = record.get("tokens", record.get("token_ids")), record.get("response")
    if tokens is not None:
        if not isinstance(tokens, list) or not all(isinstance(t, (int, str)) for t in tokens):
            raise BadRollouts(f"{where}: tokens: want a list of ids or of strings")
        pieces = [t if isinstance(t, str) else f"{t} " for t in tokens]
    elif isinstance(response, str):
        pieces = _PIECES.findall(response)
    else:
        raise BadRollouts(f"{where}: response is missing (text), and so is tokens")
    ends = [t for t, piece in enumerate(pieces) if "\n" in piece]
    if pieces and (not ends or ends[-1] != len(pieces) - 1):
        ends.append(len(pieces) - 1)
    steps = record.get("step_rewards")
    if steps is not None:
        if not isinstance(steps, list) or len(steps) != len(ends):
            came = f"{len(steps)} entries" if isinstance(steps, list) else type(steps).__name__
            raise BadRollouts(
                f"{where}: step_rewards: got {came}, want {len(ends)}, one per line of the response"
            )
        steps = [None if v is None else _number(v, f"{where}: step_rewards") for v in steps]
    return Row(
        str(record["group"]), reward, pieces, [vocabulary.setdefault(p, len(vocabulary)) for p in pieces], ends,
        steps, _numbers(record, "logprobs", len(pieces), where), _numbers(record, "entropy", len(pieces), where),
        str(record.get("sampler", record.get("label", ""))),
    )  # fmt: skip


def read(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; :class:`BadRollouts` names the first line that cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadRollouts(f"{path}: {error}") from None
    rows, vocabulary = [], {}  # type: ignore[var-annotated]
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path.name}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise BadRollouts(f"{where}: not JSON: {error.msg}") from None
        rows.append(_row(record, where, vocabulary))
    if not rows:
        raise BadRollouts(f"{path.name}: no rollouts in it")
    return rows


def _pad(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    width = max((len(r) for r in rows), default=0)
    padded = [[*r, *[0] * (width - len(r))] for r in rows]
    return torch.tensor(padded, dtype=dtype, device="cpu").reshape(len(rows), width)


def batch_of(rows: Sequence[Row]) -> Rollouts:
    """Rows as padded tensors for the ops."""
    tokens = _pad([r.ids for r in rows], torch.int64)
    lengths = torch.tensor([len(r.ids) for r in rows], dtype=torch.int64, device="cpu")
    mask = torch.arange(tokens.shape[1], dtype=torch.int64, device="cpu") < lengths[:, None]
    labels: dict[str, int] = {}
    numbers = [labels.setdefault(r.group, len(labels)) for r in rows]
    groups = torch.tensor(numbers, dtype=torch.int64, device="cpu")
    step_rewards = step_ends = None
    if all(r.step_rewards is not None for r in rows):
        step_rewards = torch.zeros(tokens.shape, dtype=torch.float32, device="cpu")
        step_ends = torch.zeros(tokens.shape, dtype=torch.bool, device="cpu")
        for b, r in enumerate(rows):
            for at, value in zip(r.line_ends, r.step_rewards or (), strict=True):
                if value is not None:
                    step_rewards[b, at], step_ends[b, at] = value, True
    entropy = None
    if all(r.entropy is not None for r in rows):
        entropy = _pad([r.entropy or [] for r in rows], torch.float32)
    elif all(r.logprobs is not None for r in rows):
        entropy = -_pad([r.logprobs or [] for r in rows], torch.float32)
    rewards = torch.tensor([r.reward for r in rows], dtype=torch.float32, device="cpu")
    return Rollouts(tokens, mask, groups, rewards, step_rewards, step_ends, entropy)


def recipes_for(rows: Sequence[Row]) -> tuple[list[str], list[str]]:
    """The recipes that the fields allow, and a note for each other recipe or limitation."""
    names, notes = ["grpo", "tempo"], []
    if all(r.step_rewards is not None for r in rows):
        names.append("pure")
    else:
        notes.append("PURE is left out: it needs step_rewards in every row.")
    if all(r.entropy is not None for r in rows):
        names.append("gtpo")
    elif all(r.logprobs is not None for r in rows):
        names.append("gtpo")
        notes.append(
            "GTPO is drawn with the surprisal of each sampled token, -logprob, in the place of the entropy, which the"
            " file does not hold."
        )
    else:
        notes.append("GTPO is left out: it needs entropy, or at least logprobs, in every row.")
    return names, notes


def telling(batch: Rollouts, count: int) -> list[int]:
    """Groups worth drawing: mixed rewards first, then the largest share of tokens in shared prefixes."""
    values = rewardops.prefix_values(batch.tokens, batch.rewards, batch.groups, mask=batch.mask)
    shared = (values.count > 1).sum(1).float()
    ranked = []
    for g in batch.groups.unique().tolist():
        rows = batch.groups == g
        rewards = batch.rewards[rows]
        length = batch.mask[rows].sum()
        mixed = bool((rewards != rewards[0]).any())
        ranked.append((not mixed, -float(shared[rows].sum() / length.clamp(min=1)), g))
    return [g for *_, g in sorted(ranked)[:count]]


def report(path: Path, wanted: Sequence[str], count: int) -> tuple[str, list[str]]:
    """The page for a file, and lines to print. ``wanted`` names groups; if empty, ``count`` groups are chosen."""
    rows = read(path)
    names, notes = recipes_for(rows)
    batch = batch_of(rows)
    by_label: dict[str, list[Row]] = {}
    for r in rows:
        by_label.setdefault(r.group, []).append(r)
    missing = [w for w in wanted if w not in by_label]
    if missing:
        raise BadRollouts(f"{path.name}: no group {missing[0]!r} in it")
    order = list(by_label)
    chosen = list(wanted) or [order[g] for g in telling(batch, count)]

    shared = rewardops.PrefixTree.from_tokens(batch.tokens, batch.groups, mask=batch.mask).dedup_stats()
    tokens = int(batch.mask.sum())
    silent = sum(len({r.reward for r in members}) == 1 for members in by_label.values())
    facts = [
        ("responses", f"{len(rows):,}"),
        ("groups", f"{len(by_label):,}"),
        ("tokens", f"{tokens:,}"),
        ("mean reward", f"{float(batch.rewards.mean()):.3f}"),
        ("groups of equal rewards, which teach nothing", f"{silent:,} ({silent / len(by_label):.0%})"),
        ("tokens in a prefix that another response shares", f"{shared.shared:.1%}"),
        ("tokens saved by computing shared prefixes once", f"{shared.saved:.1%}"),
    ]
    groups = []
    for label in chosen:
        members = by_label[label]
        part = batch_of(members)
        advantages = {name: RECIPES[name](part) for name in names}
        logprob = None
        if all(r.logprobs is not None for r in members):
            logprob = _pad([r.logprobs or [] for r in members], torch.float32)
        groups.append(
            Group(
                f"Group {label}",
                part,
                [r.pieces for r in members],
                advantages,
                logprob,
                [r.label for r in members],
            )
        )
    section = table(("the file", ""), facts) + "".join(f"<p>{note}</p>" for note in notes)
    title = f"Credit assignment on {path.name}"
    lead = f"{len(chosen)} of {len(by_label)} groups, by {', '.join(names)}. Drawn by rewardops."
    lines = [f"{key}: {value}" for key, value in facts] + notes
    return page(title, lead, section, groups_section(groups)), lines
