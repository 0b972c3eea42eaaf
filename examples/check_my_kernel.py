"""Check a Triton kernel of your own against plain PyTorch in float64, on inputs that kernels often get wrong.

Shows: rewardops.testing.check_op on a sound kernel and on one with a planted fault, and assert_within_budget for a
    single result. The budget of an error is the error of plain PyTorch in float32 on the same input.
Needs: triton. Without a GPU the kernels run in Triton's interpreter.
Takes: about 10 seconds in the interpreter.
"""

from __future__ import annotations

import os
import warnings

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it where a kernel is defined
    warnings.filterwarnings("ignore", module="triton")  # numpy's, where -inf meets -inf in the interpreter

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from rewardops.testing import adversarial_logits, assert_within_budget, check_op, logit_cases  # noqa: E402


@triton.jit
def entropy_kernel(x, out, stride, vocab, BLOCK: tl.constexpr, PADDING: tl.constexpr):
    """The entropy of a row of logits: its largest logit, then sums relative to it."""
    row = tl.program_id(0).to(tl.int64)
    top = -float("inf")
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * stride + column, mask=column < vocab, other=-float("inf")).to(tl.float32)
        top = tl.maximum(top, tl.max(z, 0))
    total = 0.0
    weighted = 0.0
    for start in range(0, vocab, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = tl.load(x + row * stride + column, mask=column < vocab, other=PADDING).to(tl.float32)
        e = tl.exp(z - top)
        total += tl.sum(e, 0)
        weighted += tl.sum(tl.where(e > 0, e * (z - top), 0.0), 0)
    tl.store(out + row, tl.log(total) - weighted / total)


def entropy(logits: torch.Tensor, tokens: torch.Tensor, padding: float = float("-inf")) -> torch.Tensor:
    out = torch.empty(len(logits), device=logits.device)
    entropy_kernel[(len(logits),)](logits, out, logits.stride(0), logits.shape[1], BLOCK=512, PADDING=padding)
    return out


def faulty_entropy(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Columns beyond the vocabulary count as logits of 0, which no vocabulary of a multiple of 512 would show."""
    return entropy(logits, tokens, padding=0.0)


def plain(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """The same in plain PyTorch, correct in float64: all that the kit needs to know."""
    logprob = logits.log_softmax(-1)
    return -torch.where(logprob > -torch.inf, logprob.exp() * logprob, 0).sum(-1)


def main() -> None:
    print(f"on {DEVICE}{' (interpreted)' if DEVICE == 'cpu' else ''}")
    # Logits far from zero, peaked, equal, tiny, of -inf; one vocabulary is larger than a block.
    cases = dict(logit_cases(device=DEVICE, vocabs=(7, 600), dtypes=(torch.float32,), far=False))
    print("the sound kernel:", check_op(entropy, plain, cases, gradients=False))
    try:
        check_op(faulty_entropy, plain, cases, gradients=False)
    except AssertionError as error:  # in a test it fails the test
        faults = str(error).splitlines()
        print(f"the faulty kernel: {len(faults)} faults in {len(cases)} cases, such as\n  {faults[0]}")

    # The same budget for a single result, wherever it comes from.
    logits = adversarial_logits("peaked", 4, 600, torch.Generator().manual_seed(0))
    found = entropy(logits.to(DEVICE), None)
    assert_within_budget(found, exact=plain(logits.double(), None), eager=plain(logits, None))
    print("a single result: within its budget")


if __name__ == "__main__":
    main()
