"""Elementary functions that Triton lacks, to full relative accuracy near 0."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_negative(x):
    """e^x - 1 for x <= 0, also where e^x is near 1."""
    c = tl.where(x < -0.5, -0.5, x)
    y = c * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    y = y * c + 1.0 / 39916800.0
    y = y * c + 1.0 / 3628800.0
    y = y * c + 1.0 / 362880.0
    y = y * c + 1.0 / 40320.0
    y = y * c + 1.0 / 5040.0
    y = y * c + 1.0 / 720.0
    y = y * c + 1.0 / 120.0
    y = y * c + 1.0 / 24.0
    y = y * c + 1.0 / 6.0
    y = y * c + 0.5
    return tl.where(x < -0.5, tl.exp(x) - 1.0, y * c * c + c)


@triton.jit
def log1p(x):
    """ln(1 + x), also where x is small: the error of 1 + x is known (Kahan)."""
    u = 1.0 + x
    off = u - 1.0
    return tl.where(off == 0.0, x, tl.log(u) * (x / tl.where(off == 0.0, 1.0, off)))
