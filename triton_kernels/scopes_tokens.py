"""Kernels of tokens relative to a scope: sums of parts of rows, and the map of their tokens."""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import Pair, fused
from .groups import place_rows
from .launch import unpair
from .rows import row_bounds
from .scans import paired
from .scopes_bonus import capped_bonus, factor_of, steered, store_range
from .scopes_parts import (
    BONUS,
    BONUS_BACKWARD,
    COLUMNS,
    COVARIANCE,
    STANDARD,
    STANDARD_BACKWARD,
    STEER,
    WEIGHTS,
    WEIGHTS_BACKWARD,
    load_factors,
    part_of,
)
from .scopes_standard import (
    gradient,
    part_gradients,
    standard_of,
    store_moments,
    through_of,
    z_score,
)
from .scopes_weights import (
    EXPONENTIAL,
    form_of,
    from_mean,
    raw_weight,
    scale_of,
    store_means,
    store_weights,
    weight_gradient,
    weight_gradients,
)
from .tiles import load_flags, load_tokens, store_tokens, tile_of, write_gaps


@triton.jit(
    do_not_specialize=[
        "batch", "ranked", "width", "total", "parts", "values_stride", "other_stride", "grad_stride", "mask_stride",
    ]
)  # fmt: skip
def parts_kernel(
    values, other, grad, mask, cu, outcomes, statistics, labels, order, sorted_labels, records,
    batch, ranked, width, total, parts, values_stride, other_stride, grad_stride, mask_stride,
    rate_high, rate_low, floor_high, floor_low,
    KIND: tl.constexpr, FORM: tl.constexpr, BY_ROW: tl.constexpr, PACKED: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_OTHER: tl.constexpr, HAS_OUTCOMES: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The first ``ranked`` programs sort rows by label; program (ranked + b, k) sums part k of row b."""
    b = tl.program_id(0) - ranked
    k = tl.program_id(1)
    if BY_ROW:  # noqa: SIM102 (known when compiled; the number of the program is not)
        if (b < 0) & (k == 0):
            place_rows(b + ranked, labels, order, sorted_labels, batch)
    if b >= 0:
        DTYPE: tl.constexpr = values.dtype.element_ty
        part = part_of(
            values, other, grad, mask, cu, b, k, parts, width, total, values_stride, other_stride, grad_stride,
            mask_stride, PER * T, PACKED,
        )  # fmt: skip
        plane = batch.to(tl.int64) * parts
        record = records + (b.to(tl.int64) * parts + k)
        if KIND == STANDARD:
            store_moments(
                record, plane, part, outcomes + b, HAS_MASK, HAS_OTHER, HAS_OUTCOMES, ALIGNED, DTYPE, PER, T
            )
        elif KIND == WEIGHTS:
            store_weights(
                record, plane, part, rate_high, rate_low, floor_high, floor_low, FORM, HAS_MASK, ALIGNED, DTYPE,
                PER, T,
            )  # fmt: skip
        elif KIND == WEIGHTS_BACKWARD:
            top = tl.load(statistics + tl.where(BY_ROW, b, 0).to(tl.int64) * COLUMNS + 2)
            form = form_of(top, rate_high, rate_low, floor_high, floor_low, DTYPE)
            tl.store(record, weight_gradients(part, form, FORM, HAS_MASK, ALIGNED, DTYPE, PER, T))
        elif KIND == STEER:
            store_range(record, plane, part, HAS_MASK, ALIGNED, DTYPE, PER, T)
        elif KIND == COVARIANCE:
            store_means(record, plane, part, HAS_MASK, ALIGNED, DTYPE, PER, T)
        else:
            scope = tl.where(BY_ROW, b, 0).to(tl.int64)
            sums = part_gradients(
                part, standard_of(statistics, scope, DTYPE), HAS_MASK, ALIGNED, DTYPE, PER, T
            )
            if values.dtype.element_ty == tl.float32:  # noqa: SIM102 (known when compiled; the sums are not)
                if not tl.abs(sums[0]) + tl.abs(sums[1]) < float("inf"):
                    wide = standard_of(statistics, scope, tl.float64)
                    sums = part_gradients(part, wide, HAS_MASK, False, tl.float64, 1, T)
            tl.store(record, sums[0])
            tl.store(record + plane, sums[1])


@triton.jit(
    do_not_specialize=[
        "batch", "width", "total", "parts", "values_stride", "other_stride", "grad_stride", "mask_stride",
        "out_stride",
    ]
)  # fmt: skip
def map_kernel(
    values, other, grad, mask, cu, statistics, found, out,
    batch, width, total, parts, values_stride, other_stride, grad_stride, mask_stride, out_stride,
    rate_high, rate_low, floor_high, floor_low,
    KIND: tl.constexpr, FORM: tl.constexpr, SHIFTED: tl.constexpr, BY_ROW: tl.constexpr, PACKED: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_OTHER: tl.constexpr, ALIGNED: tl.constexpr, PER: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Program (b, k): the tokens of part k of row b, by what was found of its scope."""
    b = tl.program_id(0)
    k = tl.program_id(1)
    DTYPE: tl.constexpr = values.dtype.element_ty
    BACKWARD: tl.constexpr = KIND == STANDARD_BACKWARD or KIND == WEIGHTS_BACKWARD or KIND == BONUS_BACKWARD
    part = part_of(
        values, other, grad, mask, cu, b, k, parts, width, total, values_stride, other_stride, grad_stride,
        mask_stride, PER * T, PACKED,
    )  # fmt: skip
    base, _ = row_bounds(cu, b, width, total, PACKED)
    to = out + base + b.to(tl.int64) * out_stride
    if k == 0:
        write_gaps(out, cu, b, batch, total, T, PACKED)
    scope = tl.where(BY_ROW, b, 0).to(tl.int64)
    s = statistics + scope * COLUMNS
    if KIND == WEIGHTS or KIND == WEIGHTS_BACKWARD:
        form = form_of(tl.load(s + 2), rate_high, rate_low, floor_high, floor_low, DTYPE)
        scale = scale_of(statistics, scope, DTYPE)
        through = Pair(scale.base, scale.base)
        if BACKWARD:
            through = paired(tl.load(found + scope * 2), DTYPE)
    elif KIND == STEER:
        least = tl.load(s).to(DTYPE)
        slope = paired(tl.load(s + 1), DTYPE)
        weight = paired(tl.load(s + 2), DTYPE)
        low = unpair(rate_high, rate_low, DTYPE)
    elif KIND == BONUS or KIND == BONUS_BACKWARD:
        alpha = factor_of(rate_high, rate_low, DTYPE)
        inverse_kappa = factor_of(floor_high, floor_low, DTYPE)
    elif KIND == COVARIANCE:
        mean = Pair(tl.load(s).to(DTYPE), tl.load(s + 1).to(DTYPE))
        other_mean = Pair(tl.load(s + 2).to(DTYPE), tl.load(s + 3).to(DTYPE))
    else:
        standard = standard_of(statistics, scope, DTYPE)
        if BACKWARD:
            slopes = through_of(found, scope, DTYPE)
    for turn in range(0, tl.cdiv(part.end - part.begin, T * PER)):
        tile = tile_of(part.begin, part.end, turn, PER, T, False)
        valid = load_flags(part.mask, tile, HAS_MASK, PER, ALIGNED)
        x = load_tokens(part.numbers, tile, PER, ALIGNED)
        w = load_factors(part.other, tile, HAS_OTHER and KIND != STANDARD, PER, ALIGNED)
        up = load_factors(part.grad, tile, BACKWARD, PER, ALIGNED)
        results = ()
        for j in tl.static_range(PER):
            if KIND == WEIGHTS:
                y = raw_weight(x[j], form, FORM)
                y = fused(y, scale.inverse, fused(y, scale.low, scale.base))
            elif KIND == WEIGHTS_BACKWARD:
                y = weight_gradient(x[j], up[j], form, scale, through, FORM)
            elif KIND == STEER:
                y = steered(x[j], least, slope, weight, low, FORM == EXPONENTIAL)
            elif KIND == BONUS or KIND == BONUS_BACKWARD:
                g = up[j] if BACKWARD else x[j]
                y = capped_bonus(x[j], w[j], alpha, inverse_kappa, BACKWARD, g)
            elif KIND == COVARIANCE:
                y = from_mean(x[j], mean) * from_mean(w[j], other_mean)
            else:
                y = z_score(x[j], standard)
                if KIND == STANDARD_BACKWARD:
                    weight = w[j] if HAS_OTHER else y
                    y = gradient(up[j], y, standard, weight, slopes, HAS_OTHER)
                elif not SHIFTED:
                    y = y + standard.rest + standard.centre
            results = results + (tl.where(valid[j], y + 0.0, 0.0),)  # noqa: RUF005 (the compiler knows no stars)
        store_tokens(to, tile, results, PER, ALIGNED)
