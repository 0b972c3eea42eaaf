"""Memory of the logits family: layouts that share some, and shapes that do not fit."""

from __future__ import annotations

import pytest
import torch

import rewardops
from rewardops.core import inplace
from rewardops.reference.logits import RECORD

CUDA = True
V = 11


def plain_gradient(leaf, make, tokens, ref=None):
    """The gradient of the summed log-probabilities, and KL if there is a reference, by log_softmax in float64."""
    d = leaf.detach().double().requires_grad_()
    logits = make(d)
    logp = logits.log_softmax(-1)
    loss = logp.gather(-1, tokens[..., None]).sum()
    if ref is not None:
        # The reference is a constant, also where it shares memory with the logits.
        loss = loss + (logp.exp() * (logp - ref(d).detach().log_softmax(-1))).sum()
    return torch.autograd.grad(loss, d)[0]


# From a leaf: logits whose rows share memory, as made from it.
SHARED = {
    "expanded": ((1, V), lambda x: x.expand(4, V)),
    "candidates of a position": ((3, V), lambda x: x[:, None].expand(3, 2, V)),
    "expanded columns": ((4, 1), lambda x: x.expand(4, V)),
    "windows": ((V + 9,), lambda x: x.as_strided((4, V), (3, 1))),
    "unfolded": ((V + 6,), lambda x: x.unfold(0, V, 2)),
}
# From a leaf: logits with memory of their own, and a reference of the same storage.
APART = {
    "halves": ((8, V), lambda x: x.chunk(2)),
    "halves of a sequence": ((2, 6, V), lambda x: x.chunk(2, 1)),
    "halves of the columns": ((4, 2 * V), lambda x: x.chunk(2, -1)),
    "rows in turn": ((4, 2, V), lambda x: x.unbind(1)),
}
TOGETHER = {
    "the same": ((4, V), lambda x: (x, x)),
    "one position later": ((2, 4, V), lambda x: (x[:, :-1], x[:, 1:])),
    "one column later": ((4, V + 1), lambda x: (x[:, :-1], x[:, 1:])),
    "expanded reference": ((4, V), lambda x: (x, x[1:2].expand(4, V))),
    "reversed": ((2, 4, V), lambda x: (x, x.transpose(0, 1).reshape(4, 2, V).transpose(0, 1))),
}


def draw(shape, rows, generator, device):
    leaf = torch.randn(shape, generator=generator)
    return leaf.to(device), torch.randint(0, V, rows, generator=generator).to(device)


class Test_token_stats_token_stats_and_grad:
    @pytest.mark.parametrize("name", SHARED)
    def test_rows_that_share_memory(self, target, generator, name):
        shape, make = SHARED[name]
        leaf, tokens = draw(shape, make(torch.zeros(shape)).shape[:-1], generator, target.device)
        want = plain_gradient(leaf, make, tokens)
        source = leaf.clone().requires_grad_()
        stats = rewardops.token_stats(make(source), tokens, inplace_backward=True)
        (got,) = torch.autograd.grad(stats.logprob.sum(), source)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(source, leaf, rtol=0, atol=0)
        one = {"logprob": torch.ones(tokens.shape, device=target.device)}
        kept = leaf.clone()
        with pytest.raises(ValueError, match="inplace: got True with logits whose rows share memory"):
            rewardops.token_stats_and_grad(make(kept), tokens, one, inplace=True)
        assert torch.equal(kept, leaf)

    @pytest.mark.parametrize("name", [*APART, *TOGETHER])
    def test_a_reference_of_the_same_storage(self, target, generator, name):
        shape, make = (APART | TOGETHER)[name]
        rows = make(torch.zeros(shape))[0].shape[:-1]
        leaf, tokens = draw(shape, rows, generator, target.device)
        want = plain_gradient(leaf, lambda x: make(x)[0], tokens, lambda x: make(x)[1])
        source = leaf.clone().requires_grad_()
        logits, ref = make(source)
        stats = rewardops.token_stats(
            logits, tokens, ref_logits=ref.detach(), outputs=("logprob", "kl"), inplace_backward=True
        )
        (got,) = torch.autograd.grad(stats.logprob.sum() + stats.kl.sum(), source)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        # The same loss, with its gradient written over the logits at the call.
        kept = leaf.clone()
        logits, ref = make(kept)
        ones = {n: torch.ones(rows, device=target.device) for n in ("logprob", "kl")}
        before = ref.clone()

        def call():
            return rewardops.token_stats_and_grad(logits, tokens, ones, ref_logits=ref, inplace=True)[1]

        if name in APART:
            in_place = torch.zeros(shape, dtype=torch.float64, device=target.device)
            make(in_place)[0].copy_(call())
            torch.testing.assert_close(in_place, want, rtol=1e-5, atol=1e-5)
            assert torch.equal(ref, before)
        elif name != "reversed":  # reshape copies
            with pytest.raises(ValueError, match="inplace: got True with ref_logits in the memory of logits"):
                call()
            assert torch.equal(kept, leaf)

    def test_usual_layouts_are_written_over(self, target, generator):
        """Views without overlaps keep the saving: their gradient is the logits' own memory."""
        views = {
            "sequence": lambda x: x[:, :-1],
            "columns": lambda x: x[..., :V],
            "every other row": lambda x: x[::2],
            "time first": lambda x: x.transpose(0, 1),
            "one row": lambda x: x[:1, :1],
        }
        for name, view in views.items():
            base = torch.randn(4, 5, V + 2, generator=generator).to(target.device)
            logits = view(base).requires_grad_()
            tokens = torch.randint(0, V, logits.shape[:-1], generator=generator).to(target.device)
            stats = rewardops.token_stats(logits, tokens, inplace_backward=True)
            (grad,) = torch.autograd.grad(stats.logprob.sum(), logits)
            assert grad.data_ptr() == logits.data_ptr(), name

    def test_other_arguments_in_the_memory_of_the_logits(self, target, generator):
        logits, tokens = draw((1, V), (1,), generator, target.device)
        want = plain_gradient(logits, lambda x: x, tokens) * logits[0, 0].double()
        leaf = logits.clone().requires_grad_()
        stats = rewardops.token_stats(leaf, tokens, inplace_backward=True)
        (got,) = torch.autograd.grad(stats.logprob, leaf, leaf.detach()[:, 0])  # upstream in the logits
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        over = logits.clone()
        with pytest.raises(ValueError, match="inplace: got True with coefficients of logprob in the memory"):
            rewardops.token_stats_and_grad(over, tokens, {"logprob": over[:, 0]}, inplace=True)
        wide = torch.randn(1, V, generator=generator, dtype=torch.float64).to(target.device)
        ones = {"logprob": torch.ones(1, device=target.device)}
        with pytest.raises(ValueError, match="inplace: got True with temperatures in the memory"):
            rewardops.token_stats_and_grad(wide.abs_(), tokens, ones, temperature=wide[:, 0], inplace=True)
        with pytest.raises(ValueError, match="inplace: got True with tokens in the memory"):
            rewardops.token_stats_and_grad(wide, wide.view(torch.int64)[:, 0].fill_(3), ones, inplace=True)

    def test_vmap_in_place(self, target, generator):
        logits, tokens = draw((2, 3, V), (2, 3), generator, target.device)
        ones = {"logprob": torch.ones(3, device=target.device)}

        def over(x, y):
            return rewardops.token_stats_and_grad(x, y, ones, inplace=True)[1]

        want = plain_gradient(logits, lambda x: x, tokens)
        kept = logits.clone()
        got = torch.vmap(over)(kept, tokens)
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(kept, got)
        # One model's logits for several labels: every one would write to the same memory.
        with pytest.raises((RuntimeError, ValueError)):
            torch.vmap(over, in_dims=(None, 0))(logits[0].clone(), tokens)
        with pytest.raises(ValueError, match="logits whose rows share memory"):
            torch.vmap(over)(logits[:1].clone().expand(2, 3, V), tokens)

    def test_ops_that_write_over_the_logits_refuse_shared_memory(self, target, generator):
        base, tokens = draw((1, V), (4,), generator, target.device)
        logits = base.expand(4, V)
        options = (1.0, 0.0, 0, V, 0.5, ["logprob"])
        saved, _ = torch.ops.rewardops.token_stats(logits, tokens, None, None, None, *options, False)
        up = torch.ones(4, device=target.device)
        with pytest.raises(ValueError, match="logits whose rows share memory"):
            torch.ops.rewardops.token_stats_backward_(
                [up], saved, logits, tokens, None, None, None, *options, True, False
            )
        with pytest.raises(ValueError, match="logits whose rows share memory"):
            torch.ops.rewardops.token_stats_and_grad_(
                [up], ["logprob"], logits, tokens, None, None, None, *options
            )

    def test_property_layouts(self, generator):
        """Against sets of addresses: no overlap is missed, and usual layouts are told apart."""
        size = 400
        storage = torch.arange(size)
        missed = refused = 0

        def view():
            dims = int(torch.randint(1, 4, (), generator=generator))
            shape = torch.randint(1, 5, (dims,), generator=generator).tolist()
            stride = torch.randint(0, 13, (dims,), generator=generator).tolist()
            offset = int(torch.randint(0, 60, (), generator=generator))
            return storage.as_strided(shape, stride, offset)

        for _ in range(2000):
            a, b = view(), view()
            mine = a.flatten().tolist()
            missed += len(set(mine)) < len(mine) and not inplace.overlaps_itself(a)
            missed += bool(set(mine) & set(b.flatten().tolist())) and not inplace.share_memory(a, b)
            c = a.as_strided(a.shape, a.stride(), int(torch.randint(0, 60, (), generator=generator)))
            missed += bool(set(mine) & set(c.flatten().tolist())) and not inplace.share_memory(a, c)
            refused += len(set(mine)) == len(mine) and inplace.overlaps_itself(a)
        assert missed == 0
        assert refused < 400  # strides such as (2, 3), which no view of a dense tensor has

    # ---- shapes that do not fit ----------------------------------------------------------------------------

    def test_arguments_of_ops_that_do_not_fit(self, target):
        """Ops called without the public functions raise, before a kernel reads or writes beyond a tensor."""
        ops, d = torch.ops.rewardops, target.device
        good = {
            "logits": torch.zeros(3, V, device=d), "tokens": torch.zeros(3, dtype=torch.int64, device=d),
            "ref_logits": torch.ones(3, V, device=d), "mask": torch.ones(3, dtype=torch.bool, device=d),
            "temperatures": torch.ones(3, dtype=torch.float64, device=d), "temperature": 1.0, "softcap": 0.0,
            "first": 0, "vocab": V, "beta": 0.5, "outputs": ["logprob", "kl"],
        }  # fmt: skip
        saved, *outputs = ops.token_stats(**good, inplace=False)
        record = ops.token_stats_partial(**good)
        grads = [torch.ones_like(o) for o in outputs]
        back = {"to_logits": True, "to_ref": True}
        partial = {"record": record, "grad_record": torch.ones_like(record), **back}
        known = {"coefficients": grads, "terms": ["logprob", "kl"]}
        calls = {
            "token_stats": {"inplace": False}, "token_stats_partial": {},
            "token_stats_backward": {"grads": grads, "saved": saved, **back},
            "token_stats_backward_": {"grads": grads, "saved": saved, **back},
            "token_stats_partial_backward": partial,
            "token_stats_and_grad": known, "token_stats_and_grad_": known,
        }  # fmt: skip
        bad = {
            "tokens": [good["tokens"][:2], good["tokens"].int(), good["tokens"][:, None], good["tokens"].repeat(2)],
            "ref_logits": [good["ref_logits"][:, :5], good["ref_logits"][:2], good["ref_logits"].double()],
            "mask": [good["mask"][:2], good["mask"].long(), good["mask"][:, None]],
            "temperatures": [good["temperatures"][:1], good["temperatures"].float(), good["temperatures"][:, None]],
            "logits": [good["logits"][:, :5], good["logits"][:2], good["logits"][0], good["logits"][None]],
            "vocab": [V + 1, -1], "first": [-1],
            "outputs": [["kl", "kl"], ["logprob", "perplexity"]],
        }  # fmt: skip
        for op, rest in calls.items():
            getattr(ops, op)(**(good | {"logits": good["logits"].clone()}), **rest)
            for name, values in bad.items():
                for value in values:
                    with pytest.raises((ValueError, TypeError)):
                        getattr(ops, op)(**(good | {name: value}), **rest)
            with pytest.raises(ValueError, match="outputs: got"):
                getattr(ops, op)(**(good | {"ref_logits": None}), **rest)
        wrong = {
            "saved": [saved[:5], saved[:, :2], saved.float()],
            "grad_record": [record[:2], record[:, : len(RECORD) - 1]],
            "record": [record[:2], record[:, :5], record.float()],
            "grads": [grads[:1], [grads[0][:2], None], [grads[0].double(), None]],
            "coefficients": [grads[:1], [g[:2] for g in grads]], "terms": [["logprob"], ["logprob", "entropy"]],
        }  # fmt: skip
        for op, rest in calls.items():
            for name in rest.keys() & wrong.keys():
                for value in wrong[name]:
                    with pytest.raises((ValueError, TypeError)):
                        getattr(ops, op)(**good, **(rest | {name: value}))
        assert not good["logits"].any()
