"""The task: addition with worked columns, in which every step and the answer can be checked.

``347+285:`` is worked as ``7+5+0=12;4+8+1=13;3+2+1=06;#632$``: from the right, two digits and the carry, their sum
in two digits, and the answer after ``#``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SYMBOLS = "0123456789+=:;#$_"
PAD, END, STEP = SYMBOLS.index("_"), SYMBOLS.index("$"), SYMBOLS.index(";")
_IDS = {symbol: index for index, symbol in enumerate(SYMBOLS)}


def encode(text: str) -> list[int]:
    return [_IDS[symbol] for symbol in text]


def decode(ids: list[int]) -> str:
    return "".join(SYMBOLS[i] for i in ids)


@dataclass(frozen=True)
class Problem:
    """Two numbers of the same number of digits."""

    a: int
    b: int
    digits: int

    @property
    def prompt(self) -> str:
        return f"{self.a:0{self.digits}d}+{self.b:0{self.digits}d}:"

    @property
    def steps(self) -> list[str]:
        """The correct lines, each with its end mark; the last is the answer."""
        lines, carry = [], 0
        for k in range(self.digits):
            x, y = self.a // 10**k % 10, self.b // 10**k % 10
            lines.append(f"{x}+{y}+{carry}={x + y + carry:02d};")
            carry = (x + y + carry) // 10
        return [*lines, f"#{self.a + self.b}$"]

    @property
    def solution(self) -> str:
        return "".join(self.steps)


@dataclass(frozen=True)
class Verdict:
    """The result of checking a response."""

    right: bool
    ends: list[int]
    """The tokens that end a step."""
    step_rewards: list[float]
    """1 for a correct step and 0 for a wrong one, in the order of ``ends``."""


def check(problem: Problem, response: str) -> Verdict:
    """Check a response step by step; a truncated one ends with its unfinished step, which is wrong."""
    ends: list[int] = []
    rewards: list[float] = []
    start = 0
    wanted = problem.steps
    for at, symbol in enumerate(response):
        last = at == len(response) - 1
        if symbol not in ";$" and not last:
            continue
        line, k = response[start : at + 1], len(ends)
        ends.append(at)
        rewards.append(1.0 if k < len(wanted) and line == wanted[k] else 0.0)
        start = at + 1
    return Verdict(response.endswith(wanted[-1]) and response.count("#") == 1, ends, rewards)


def is_held_out(a: int, b: int) -> bool:
    """True for one pair of numbers in eight, selected by a hash; these are never trained on."""
    return ((a * 2654435761 + b * 2246822519) >> 9) % 8 == 0


def problems(count: int, digits: int, seed: int, *, held_out: bool = False) -> list[Problem]:
    """Random training problems, or random held-out problems."""
    draw = random.Random(seed)
    drawn: list[Problem] = []
    low, high = 10 ** (digits - 1), 10**digits - 1
    while len(drawn) < count:
        a, b = draw.randint(low, high), draw.randint(low, high)
        if is_held_out(a, b) == held_out:
            drawn.append(Problem(a, b, digits))
    return drawn
