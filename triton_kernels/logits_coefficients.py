"""Coefficients of a row's gradient for both models, from upstream gradients and saved statistics."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .logits_records import (
    AT_DISTANCE,
    AT_KL,
    AT_REF_TOKEN,
    AT_REF_TOTAL,
    AT_REVERSE,
    AT_SQUARES,
    AT_SQUARES_WEIGHTED,
    AT_TOKEN,
    AT_TOTAL,
    AT_WEIGHTED,
)
from .logits_rows import (
    ENTROPY,
    JSD,
    KL,
    LOGPROB,
    LOGSUMEXP,
    MEAN_LOGIT,
    MOMENTS,
    REF_LOGPROB,
    REVERSE_KL,
    SAVED_ENTROPY,
    SAVED_KL,
    SAVED_MIXED_KL,
    SAVED_REF_MIXED_KL,
    SAVED_REVERSE_KL,
    SAVED_SUM_SQ,
    SAVED_SUM_SQ_LOGPROB,
    SUM_SQ,
    SUM_SQ_LOGPROB,
    saved_at,
    split,
)

# ---- records -----------------------------------------------------------------------------------------------


class Gradients(NamedTuple):
    """Pointers to the upstream gradients ``[N]`` of the outputs; the pointer of a missing one is not used."""

    logprob: Any
    entropy: Any
    logsumexp: Any
    sum_p2: Any
    sum_p2_logp: Any
    mean_logit: Any
    ref_logprob: Any
    kl: Any
    reverse_kl: Any
    jsd: Any


class Softmax(NamedTuple):
    """The normalisation of a model's row: p = e^distance / total, distance = (logit - shift) / temperature."""

    shift: Any  # the largest logit, as stored; accumulation type
    total: Any  # sum of e^distance in float64; 1 for records, whose sums are not normalised
    log_total: Any


class Side(NamedTuple):
    """Coefficients of the gradient of one model's scaled logits, float64::

        p (on_p + on_log log p + on_gap (log p - log q - mean_gap) + on_mixed (log p - log m))
        + p^2 (on_square + on_square_log log p) + on_q q + on_one + [column = token] on_token

    p: its probabilities, q: the other model's, m: their mixture; ``on_q`` is ``-on_gap`` of the other side. In the
    gradient of a record p and q are not normalised.
    """

    on_p: Any
    on_log: Any
    on_square: Any
    on_square_log: Any
    on_gap: Any
    mean_gap: Any  # the mean of log p - log q under p
    on_mixed: Any
    on_one: Any
    on_token: Any


class Coefficients(NamedTuple):
    """A `Side` in the accumulation type, in terms of distances and their exponentials::

        e (on_e + on_distance d + (on_square + on_square_distance d) e
           + on_gap (d - d' - mean_gap) + on_mixed (log p - log m))
        + on_other e' + on_one + [column = token] on_token

    d: a distance to the model's largest logit, e = e^d; d' and e': the other model's.
    """

    on_e: Any
    on_distance: Any
    on_square: Any
    on_square_distance: Any
    on_gap: Any
    mean_gap: Any
    on_mixed: Any
    on_other: Any
    on_one: Any
    on_token: Any


@triton.jit
def softmax_of_record(shift, inv, ACC: tl.constexpr):
    """The `Softmax` of a record, from its shift, a scaled logit, and the inverse temperature."""
    # The quotient rounds to the original logit. Where all logits are -inf, any shift leaves them without mass.
    shift = tl.where(shift == float("-inf"), 0.0, shift / inv).to(ACC)
    one = tl.full([], 1.0, tl.float64)
    return Softmax(shift, one, tl.log(one))


@triton.jit
def sides_of_record(grad, found, HAS_REF: tl.constexpr):
    """Coefficients of the policy and of the reference from the gradient of a row's record."""
    zero = tl.zeros([], tl.float64)
    on_log = tl.load(grad + AT_WEIGHTED)
    on_p = tl.load(grad + AT_TOTAL) + on_log
    on_square_log = 2.0 * tl.load(grad + AT_SQUARES_WEIGHTED)
    on_square = 2.0 * tl.load(grad + AT_SQUARES) + 0.5 * on_square_log
    on_one = tl.load(grad + AT_DISTANCE)
    on_token = tl.where(found, tl.load(grad + AT_TOKEN), 0.0)
    on_gap = zero
    ref_on_gap = zero
    ref_on_p = zero
    ref_on_token = zero
    if HAS_REF:
        on_gap = tl.load(grad + AT_KL)
        ref_on_gap = tl.load(grad + AT_REVERSE)
        on_p += on_gap
        ref_on_p = tl.load(grad + AT_REF_TOTAL) + ref_on_gap
        ref_on_token = tl.where(found, tl.load(grad + AT_REF_TOKEN), 0.0)
    policy = Side(on_p, on_log, on_square, on_square_log, on_gap, zero, zero, on_one, on_token)
    ref = Side(ref_on_p, zero, zero, zero, ref_on_gap, zero, zero, zero, ref_on_token)
    return policy, ref


@triton.jit
def softmax_of_saved(saved, SHIFT: tl.constexpr, TOTAL: tl.constexpr, n, count, ACC: tl.constexpr):
    """The `Softmax` of a model, from the saved rows of its shift and total."""
    total = tl.load(saved_at(saved, TOTAL, n, count))
    return Softmax(tl.load(saved_at(saved, SHIFT, n, count)).to(ACC), total, tl.log(total))


@triton.jit
def upstream(grad, n, HAS_GRAD: tl.constexpr):
    """The gradient of an output in row n; 0 where it has none."""
    if HAS_GRAD:
        return tl.load(grad + n).to(tl.float64)
    else:
        return tl.zeros([], tl.float64)


@triton.jit
def finite_part(grad, value):
    """The gradient of a divergence; 0 where its value is infinite, as that does not change with the logits."""
    return tl.where(tl.abs(value) == float("inf"), 0.0, grad)


@triton.jit
def sides_of_outputs(grads, saved, n, count, found, vocab, beta, GRADS: tl.constexpr):
    """Coefficients of the policy and of the reference from the gradients of a row's statistics."""
    zero = tl.zeros([], tl.float64)
    mean_gap = zero
    ref_mean_gap = zero
    on_mixed = zero
    ref_on_mixed = zero
    # A token's log-probability that is NaN has a gradient of NaN.
    on_token = upstream(grads.logprob, n, LOGPROB & GRADS)
    if LOGPROB & GRADS:
        on_token = tl.where(found, on_token, float("nan"))
    entropy = upstream(grads.entropy, n, ENTROPY & GRADS)
    sum_p2 = upstream(grads.sum_p2, n, SUM_SQ & GRADS)
    on_log = -entropy
    moment = upstream(grads.sum_p2_logp, n, SUM_SQ_LOGPROB & GRADS)
    on_square = 2.0 * sum_p2 + moment
    on_square_log = 2.0 * moment
    on_p = upstream(grads.logsumexp, n, LOGSUMEXP & GRADS) - on_token
    if ENTROPY & GRADS:
        on_p -= entropy * tl.load(saved_at(saved, SAVED_ENTROPY, n, count))
    if MOMENTS & GRADS:
        on_p -= on_square * tl.load(saved_at(saved, SAVED_SUM_SQ, n, count))
    if SUM_SQ_LOGPROB & GRADS:
        on_p -= on_square_log * tl.load(saved_at(saved, SAVED_SUM_SQ_LOGPROB, n, count))
    on_one = upstream(grads.mean_logit, n, MEAN_LOGIT & GRADS) / vocab
    ref_on_token = upstream(grads.ref_logprob, n, REF_LOGPROB & GRADS)
    if REF_LOGPROB & GRADS:
        ref_on_token = tl.where(found, ref_on_token, float("nan"))
    on_gap = upstream(grads.kl, n, KL & GRADS)
    ref_on_gap = upstream(grads.reverse_kl, n, REVERSE_KL & GRADS)
    ref_on_p = -ref_on_token
    if KL & GRADS:
        kl = tl.load(saved_at(saved, SAVED_KL, n, count))
        on_gap = finite_part(on_gap, kl)
        mean_gap = finite_part(kl, kl)
        ref_on_p += on_gap
    if REVERSE_KL & GRADS:
        reverse_kl = tl.load(saved_at(saved, SAVED_REVERSE_KL, n, count))
        ref_on_gap = finite_part(ref_on_gap, reverse_kl)
        ref_mean_gap = finite_part(reverse_kl, reverse_kl)
        on_p += ref_on_gap
    if JSD & GRADS:
        jsd = upstream(grads.jsd, n, JSD & GRADS)
        on_mixed = (1.0 - beta) * jsd
        ref_on_mixed = beta * jsd
        on_p -= on_mixed * tl.load(saved_at(saved, SAVED_MIXED_KL, n, count))
        ref_on_p -= ref_on_mixed * tl.load(saved_at(saved, SAVED_REF_MIXED_KL, n, count))
    policy = Side(on_p, on_log, on_square, on_square_log, on_gap, mean_gap, on_mixed, on_one, on_token)
    ref = Side(ref_on_p, zero, zero, zero, ref_on_gap, ref_mean_gap, ref_on_mixed, zero, ref_on_token)
    return policy, ref


@triton.jit
def folded(
    side, softmax, other_on_gap, other,
    LOG: tl.constexpr, SQUARE_LOG: tl.constexpr, MEET: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The coefficients of a side's exponentials and distances.

    Totals and the constants of log p = distance - log total are folded in, in float64. Near the largest logit,
    where the mass is, distances are small, and free of the rounding errors of these constants. ``MEET``: there is a
    divergence, in which both sides meet.
    """
    on_p = side.on_p
    on_square = side.on_square
    mean_gap = side.mean_gap
    if LOG:
        on_p -= side.on_log * softmax.log_total
    if SQUARE_LOG:
        on_square -= side.on_square_log * softmax.log_total
    if MEET:
        # log p - log q = d - d' + log (other total / total); minus its mean it is small where the mass is.
        mean_gap, rounding = split(mean_gap - (other.log_total - softmax.log_total), ACC)
        on_p -= side.on_gap * rounding.to(tl.float64)
    total = softmax.total
    square = total * total
    return Coefficients(
        (on_p / total).to(ACC), (side.on_log / total).to(ACC), (on_square / square).to(ACC),
        (side.on_square_log / square).to(ACC), (side.on_gap / total).to(ACC), mean_gap,
        (side.on_mixed / total).to(ACC), (-other_on_gap / other.total).to(ACC), side.on_one.to(ACC),
        side.on_token.to(ACC),
    )  # fmt: skip
