"""The same computation by other packages, adapted so that the numbers agree, or the reason why it is missing.

Adapters take and return ``[B, T]`` or ``[N]`` tensors as the plain formulas do. Other arguments of a package
(float masks, flags, labels as numpy arrays) are prepared outside the measured time.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .case import Function, Missing
from .data import Data

Peers = dict[str, Function | Missing]


@functools.cache
def _module(name: str) -> Any:
    """The module, or the reason why it is missing."""
    package = name.partition(".")[0]
    title = package.replace("_", "-")
    if importlib.util.find_spec(package) is None:
        return Missing(f"{title} is not installed")
    try:
        return importlib.import_module(name)
    except Exception as error:  # an installed package may fail to import in any way
        return Missing(f"{title} does not import: {str(error).splitlines()[0][:100]}")


def _from(name: str, adapter: Callable[[Any], Function]) -> Function | Missing:
    """The adapter applied to a module, if it can be imported."""
    module = _module(name)
    return module if isinstance(module, Missing) else adapter(module)


def _verl(d: Data, adapter: Callable[[Any], Function], *, loop: bool = False) -> Function | Missing:
    """A function of verl's core algorithms, which have no gradient."""
    adapted = _from("verl.trainer.ppo.core_algos", adapter)
    if isinstance(adapted, Missing):
        return adapted
    if d.backward:
        return Missing("has no gradient")
    if loop and d.sizes.length > 2**14:
        return Missing(f"a loop over {d.sizes.length} tokens")
    return adapted


# ---- logits --------------------------------------------------------------------------------------------------


def token_stats(d: Data) -> Peers:
    """TRL: its fused kernel on a GPU, its two functions on a CPU. verl: its two functions."""

    def verl(functional: Any) -> Function:
        def call(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
            logprob = functional.logprobs_from_logits(logits, tokens, inplace_backward=False)
            return logprob, functional.entropy_from_logits(logits)

        return call

    return {
        "trl": _from("trl.trainer.utils", lambda m: m.selective_log_softmax_and_entropy),
        "verl": _from("verl.utils.torch_functional", verl),
    }


def token_stats_and_grad(d: Data) -> Peers:
    """:func:`token_stats` with autograd."""

    def with_gradient(stats: Function) -> Function:
        def call(logits: Tensor, tokens: Tensor, coefficients: Tensor) -> tuple[Tensor, ...]:
            leaf = logits.detach().requires_grad_()
            logprob, entropy = stats(leaf, tokens)
            (grad,) = torch.autograd.grad((coefficients * (logprob + 0.01 * entropy)).sum(), leaf)
            return logprob.detach(), entropy.detach(), grad

        return call

    return {k: v if isinstance(v, Missing) else with_gradient(v) for k, v in token_stats(d).items()}


# ---- hidden states -------------------------------------------------------------------------------------------


def _trl_chunks(outputs: tuple[str, ...]) -> Function | Missing:
    """TRL's tiles of tokens by vocabulary; statistics beside the log-probability on request."""

    def adapter(m: Any) -> Function:
        def call(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Any:
            results = m.ChunkedLogProbFunction.apply(
                hidden, weight, None, tokens, 1.0, 8192, None, 1.0, outputs
            )
            return (results[0], results[1]) if outputs else results[0]

        return call

    return _from("trl.kernels.chunked_logprob", adapter)


def _cut_cross_entropy(d: Data) -> Function | Missing:
    """cut-cross-entropy: on a GPU its kernels without the filter of small gradients, which changes the numbers.

    On a CPU its compiled matmul and cross-entropy.
    """
    impl = "cce" if d.device.type == "cuda" else "torch_compile"

    def adapter(m: Any) -> Function:
        def call(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            return -m.linear_cross_entropy(
                hidden, weight, tokens, reduction="none", filter_eps=None, impl=impl
            )

        return call

    return _from("cut_cross_entropy", adapter)


def _liger_cross_entropy(d: Data) -> Function | Missing:
    def adapter(m: Any) -> Function:
        def call(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
            fused = m.LigerFusedLinearCrossEntropyFunction
            return -fused.apply(hidden, weight, tokens, None, None, -100, 0.0, 0.0, "none")[0]

        return call

    adapted = _from("liger_kernel.ops.fused_linear_cross_entropy", adapter)
    return adapted if isinstance(adapted, Missing) or d.device.type == "cuda" else Missing("needs a GPU")


def linear_token_stats(d: Data) -> Peers:
    return {"trl": _trl_chunks(("entropy",))}


def linear_logprob(d: Data) -> Peers:
    return {
        "trl": _trl_chunks(()),
        "cut-cross-entropy": _cut_cross_entropy(d),
        "liger": _liger_cross_entropy(d),
    }


def linear_loss(d: Data) -> Peers:
    """Per-token log-probabilities times the coefficients; and Liger's GRPO loss.

    Liger gets rows of one token, advantages that undo its sign and its mean over tokens, and no reference. At a
    ratio of 1 its gradient equals that of the loss, but its value differs.
    """

    def weighted(logprob: Function) -> Function:
        return lambda h, w, tokens, coefficients: (coefficients * logprob(h, w, tokens)).sum()

    def liger(m: Any) -> Function:
        def call(hidden: Tensor, weight: Tensor, tokens: Tensor, coefficients: Tensor) -> Tensor:
            n = len(tokens)
            loss = m.LigerFusedLinearGRPOLoss(
                beta=0.0, use_ref_model=False, chunk_size=n, loss_type="dr_grpo", max_completion_length=1
            )
            one = torch.ones(n, 1, device=hidden.device)
            results = loss(hidden[:, None], weight, tokens[:, None], one, -n * coefficients)
            return results[0]

        return call

    logprobs = linear_logprob(d)
    del logprobs["liger"]
    peers = {k: v if isinstance(v, Missing) else weighted(v) for k, v in logprobs.items()}
    return {**peers, "liger": _from("liger_kernel.chunked_loss", liger)}


def linear_jsd(d: Data) -> Peers:
    """TRL's chunked divergence, averaged; Liger's distillation loss without its label term."""

    def trl(m: Any) -> Function:
        def call(h: Tensor, w: Tensor, ref_h: Tensor, ref_w: Tensor, tokens: Tensor) -> Tensor:
            return m.ChunkedDivergenceFunction.apply(h, w, None, ref_h, ref_w, None, 0.5)[0].mean()

        return call

    def liger(m: Any) -> Function:
        loss = m.LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
        return lambda h, w, ref_h, ref_w, tokens: loss(h, w, ref_h, ref_w, tokens)

    return {
        "trl": _from("trl.kernels.chunked_divergence", trl),
        "liger": _from("liger_kernel.chunked_loss", liger),
    }


# ---- tokens --------------------------------------------------------------------------------------------------


def token_kl(d: Data) -> Peers:
    """verl's KL, masked afterwards; these log-probabilities do not reach its clamps."""
    mask = d.mask
    algorithms = "verl.trainer.ppo.core_algos"
    return {"verl": _from(algorithms, lambda m: lambda a, r: m.kl_penalty(a, r, "low_var_kl") * mask)}


def whiten(d: Data) -> Peers:
    """verl's whitening, masked afterwards."""
    mask = d.mask
    return {"verl": _from("verl.utils.torch_functional", lambda m: lambda x: m.masked_whiten(x, mask) * mask)}


def group_advantages(d: Data) -> Peers:
    """verl's two versions, with the reward at one token of the row; the first is its default, a loop over rows."""
    mask, labels = d.mask.float(), d.labels.cpu().numpy()

    def verl(name: str) -> Function | Missing:
        return _verl(d, lambda m: lambda r: getattr(m, name)(r[:, None], mask, labels)[0])

    return {
        "verl": verl("compute_grpo_outcome_advantage"),
        "verl, vectorised": verl("compute_grpo_vectorized_outcome_advantage"),
    }


def _without_whitening(fn: Function) -> Function:
    """Call a function of verl with its whitening disabled."""
    names = types.SimpleNamespace(masked_whiten=lambda values, mask: values)
    return types.FunctionType(fn.__code__, {**fn.__globals__, "verl_F": names}, fn.__name__, fn.__defaults__)


def _episodes(d: Data) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """For torchrl: episode ends, at a row's last token and last column; and the reshape to ``[B, T, 1]``."""
    place = torch.arange(d.mask.shape[1], device=d.device)
    done = (place == d.lengths - 1) | (place == d.mask.shape[1] - 1)
    return done[..., None], lambda x: x[..., None]


def _torchrl(d: Data, adapter: Callable[[Any], Function]) -> Function | Missing:
    adapted = _from("torchrl.objectives.value.functional", adapter)
    return Missing("knows no masks with holes") if d.holes and not isinstance(adapted, Missing) else adapted


def discounted_returns(d: Data, gamma: float) -> Peers:
    """verl's REINFORCE++ (a loop over time) without its whitening; torchrl's reward to go."""
    mask, live, config = d.mask, d.mask.float(), types.SimpleNamespace(gamma=gamma)
    done, _ = _episodes(d)

    def verl(m: Any) -> Function:
        fn = _without_whitening(m.compute_reinforce_plus_plus_outcome_advantage)
        return lambda r: fn(r, live, config)[1]

    def torchrl(m: Any) -> Function:
        return lambda r: m.reward2go(r, done[..., 0], gamma, time_dim=-1) * mask

    return {"verl": _verl(d, verl, loop=True), "torchrl": _torchrl(d, torchrl)}


def gae(d: Data, gamma: float, lam: float) -> Peers:
    """verl's GAE (a loop over time) without its whitening; torchrl's vectorised GAE. Both masked afterwards."""
    mask, live = d.mask, d.mask.float()
    done, column = _episodes(d)

    def verl(m: Any) -> Function:
        fn = _without_whitening(m.compute_gae_advantage_return)

        def call(rewards: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
            advantages, returns = fn(rewards, values, live, gamma, lam)
            return advantages * mask, returns * mask

        return call

    def torchrl(m: Any) -> Function:
        def call(rewards: Tensor, values: Tensor) -> tuple[Tensor, ...]:
            following = torch.nn.functional.pad(values[:, 1:], (0, 1))
            inputs = (column(x) for x in (values, following, rewards))
            results = m.vec_generalized_advantage_estimate(gamma, lam, *inputs, done)
            return tuple(x[..., 0] * mask for x in results)

        return call

    return {"verl": _verl(d, verl, loop=True), "torchrl": _torchrl(d, torchrl)}


def lambda_returns(d: Data, gamma: float, lam: float) -> Peers:
    """torchrl's vectorised function, masked afterwards."""
    mask = d.mask
    done, column = _episodes(d)

    def torchrl(m: Any) -> Function:
        def call(rewards: Tensor, values: Tensor) -> Tensor:
            following = torch.nn.functional.pad(values[:, 1:], (0, 1))
            returns = m.vec_td_lambda_return_estimate(gamma, lam, column(following), column(rewards), done)
            return returns[..., 0] * mask

        return call

    return {"torchrl": _torchrl(d, torchrl)}


def vtrace(d: Data, gamma: float) -> Peers:
    """torchrl's V-trace (a loop over time), with behaviour log-probabilities of 0; masked afterwards."""
    mask = d.mask
    done, column = _episodes(d)

    def torchrl(m: Any) -> Function:
        def call(rewards: Tensor, values: Tensor, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
            ratio, following = column(log_ratio), torch.nn.functional.pad(values[:, 1:], (0, 1))
            advantages, targets = m.vtrace_advantage_estimate(
                gamma,
                ratio,
                torch.zeros_like(ratio),
                column(values),
                column(following),
                column(rewards),
                done,
            )
            return targets[..., 0] * mask, advantages[..., 0] * mask

        return call

    return {"torchrl": _torchrl(d, torchrl)}
