"""Arithmetic that Triton lacks: functions to full relative accuracy near 0, exact products, compensated sums."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .launch import INTERPRETED, Constant

EMULATED = Constant(INTERPRETED)


@triton.jit
def fused(x, y, z):
    """x * y + z, rounded once. The interpreter has no such instruction; in float64, float32's product is exact."""
    if EMULATED:
        return (x.to(tl.float64) * y + z).to(x.dtype)
    else:
        return tl.fma(x, y, z)


class Pair(NamedTuple):
    """A sum in two parts: the rounded sum, and what rounding has lost."""

    sum: Any
    rest: Any


@triton.jit
def add_to(pair, factor, value):
    """factor * pair + value, with a factor that is a power of two (Kahan)."""
    total = pair.sum * factor
    value += pair.rest * factor
    new = total + value
    return Pair(new, value - (new - total))


@triton.jit
def add_pairs(a, a_rest, b, b_rest):
    """The sum of two pairs, to twice the digits (Knuth)."""
    total = a + b
    other = total - a
    return total, (a - (total - other)) + (b - other) + (a_rest + b_rest)


@triton.jit
def difference(a, b):
    """a - b, and what the rounding has lost (Knuth)."""
    total = a - b
    part = total - a
    return total, (a - (total - part)) - (b + part)


@triton.jit
def sum_pairs(pair):
    """The sum over all lanes, float64."""
    total, rest = tl.reduce((pair.sum, pair.rest), 0, add_pairs)
    return total.to(tl.float64) + rest.to(tl.float64)


@tl.core.builtin
def for_ptx(_semantic=None):
    """Whether the kernel is compiled for PTX, as a constant."""
    return tl.constexpr(_semantic.builder.options.backend_name == "cuda")


@triton.jit
def approximate_log2(x):
    """The logarithm to base 2 of a normal number, float32, to 2^-22: one instruction where there is one."""
    if EMULATED:
        return tl.log2(x)
    elif for_ptx():
        return tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], x.dtype, True, 1)
    else:
        return tl.log2(x)


@triton.jit
def inverse(x):
    """1 / x of a number that is not below 2^-126, to an ulp: in float32 one instruction where there is one."""
    if EMULATED:
        return 1.0 / x
    elif for_ptx() and x.dtype == tl.float32:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], x.dtype, True, 1)
    else:
        return 1.0 / x


@triton.jit
def expm1_negative(x):
    """e^x - 1 for x <= 0, by a Taylor polynomial where e^x is near 1."""
    near = tl.where(x < -0.5, -0.5, x)
    if x.dtype == tl.float64:
        series = near * (1.0 / 6227020800.0) + 1.0 / 479001600.0
        series = series * near + 1.0 / 39916800.0
        series = series * near + 1.0 / 3628800.0
        series = series * near + 1.0 / 362880.0
        series = series * near + 1.0 / 40320.0
    else:
        series = near * (1.0 / 362880.0) + 1.0 / 40320.0
    series = series * near + 1.0 / 5040.0
    series = series * near + 1.0 / 720.0
    series = series * near + 1.0 / 120.0
    series = series * near + 1.0 / 24.0
    series = series * near + 1.0 / 6.0
    series = series * near + 0.5
    return tl.where(x < -0.5, tl.exp(x) - 1.0, series * near * near + near)


@triton.jit
def log1p(x):
    """ln(1 + x), corrected for the rounding error of 1 + x (Kahan)."""
    rounded = 1.0 + x
    change = rounded - 1.0
    return tl.where(change == 0.0, x, tl.log(rounded) * (x / tl.where(change == 0.0, 1.0, change)))
