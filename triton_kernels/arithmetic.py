"""Elementary functions that Triton lacks, to full relative accuracy near 0."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expm1_negative(x):
    """e^x - 1 for x <= 0, by a Taylor polynomial where e^x is near 1."""
    near = tl.where(x < -0.5, -0.5, x)
    series = near * (1.0 / 6227020800.0) + 1.0 / 479001600.0
    series = series * near + 1.0 / 39916800.0
    series = series * near + 1.0 / 3628800.0
    series = series * near + 1.0 / 362880.0
    series = series * near + 1.0 / 40320.0
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


@triton.jit
def tanh(x):
    """tanh x by e^2x; near 0, where that cancels, by a rational function (Cephes)."""
    a = tl.abs(x)
    z = a * a
    p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
    q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
    t = tl.where(a < 0.625, a + a * z * (p / q), 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0))
    return tl.where(x < 0, -t, t)
