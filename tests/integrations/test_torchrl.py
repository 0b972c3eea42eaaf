"""torchrl: its functions and its estimators, against ours in their place."""

from __future__ import annotations

import functools

import pytest
import torch

pytest.importorskip("torchrl")

from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.objectives.value import GAE, TD1Estimator, TDLambdaEstimator, VTrace, advantages
from torchrl.objectives.value import functional as theirs

from rewardops.integrations import torchrl as ours

SHAPES = {  # shape, dimension of time
    "one row": ((11, 1), -2),
    "batch": ((3, 17, 1), -2),
    "features": ((2, 3, 9, 4), -2),
    "time first": ((13, 2, 3), 0),
    "no feature": ((4, 10), -1),
    "middle": ((2, 8, 3, 2), 1),
}
NAMES = {  # ours is of both of torchrl's forms
    "generalized_advantage_estimate": ("state_value", "next_state_value"),
    "td_lambda_return_estimate": ("next_state_value",),
    "td_lambda_advantage_estimate": ("state_value", "next_state_value"),
    "td1_return_estimate": ("next_state_value",),
    "td1_advantage_estimate": ("state_value", "next_state_value"),
    "vtrace_advantage_estimate": ("state_value", "next_state_value"),
}


def steps(seed, shape, dtype=torch.float64, ends=0.25):
    """Values that differ from the next step's, rewards, and flags; some ends are terminations."""
    generator = torch.Generator().manual_seed(seed)
    names = ("state_value", "next_state_value", "reward", "log_pi", "log_mu")
    out = {name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for name in names}
    out["log_mu"] = (out["log_pi"] + 0.3 * out["log_mu"]).to(dtype)
    done = torch.rand(shape, generator=generator) < ends
    terminated = done & (torch.rand(shape, generator=generator) < 0.5)
    return out, done, terminated


def arguments(name, tensors):
    wanted = [*NAMES[name], "reward"]
    if name.startswith("vtrace"):
        wanted += ["log_pi", "log_mu"]
    found = {key: tensors[key] for key in wanted}
    found["gamma"] = 31 / 32  # exact in float32, to which torchrl's GAE rounds it whatever the values are
    if "lambda" in name or name.startswith("general"):
        found["lmbda"] = 7 / 8
    return found


def results(fn, name, tensors, done, terminated, time_dim, grad=True, **changes):
    """What it returns, and its gradients in values and rewards."""
    given = arguments(name, tensors)
    leaves = [given[key] for key in (*NAMES[name], "reward")]
    if grad:
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        given.update(zip((*NAMES[name], "reward"), leaves, strict=True))
    out = fn(**{**given, **changes}, done=done, terminated=terminated, time_dim=time_dim)
    out = out if isinstance(out, tuple) else (out,)
    if not grad:
        return out
    # Weights that differ, so that no two steps' gradients are mistaken for each other.
    weights = [torch.cos(torch.arange(o.numel(), dtype=o.dtype) + i).view_as(o) for i, o in enumerate(out)]
    total = sum((o * w).sum() for o, w in zip(out, weights, strict=True))
    return (*(o.detach() for o in out), *torch.autograd.grad(total, leaves))


# ---- functions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", NAMES)
def test_same_as_torchrl_with_gradients(name, kind):
    shape, time_dim = SHAPES[kind]
    reference = getattr(theirs, name)
    for seed, ends in ((0, 0.25), (1, 0.0), (2, 1.0)):
        batch = steps(seed, shape, ends=ends)
        found = results(getattr(ours, name), name, *batch, time_dim)
        expected = results(reference, name, *batch, time_dim)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("vtrace")])
def test_same_as_torchrls_vectorised_form(name):
    for seed in range(3):
        batch = steps(seed, (3, 40, 2))
        found = results(getattr(ours, name), name, *batch, -2)
        expected = results(getattr(theirs, f"vec_{name}"), name, *batch, -2)
        # It drops powers of gamma * lambda below 1e-7.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("name", NAMES)
def test_terminated_is_done_by_default(name):
    tensors, done, _ = steps(3, (2, 12, 1))
    found = results(getattr(ours, name), name, tensors, done, None, -2)
    torch.testing.assert_close(found, results(getattr(theirs, name), name, tensors, done, None, -2))
    torch.testing.assert_close(found, results(getattr(ours, name), name, tensors, done, done, -2))


@pytest.mark.parametrize("name", NAMES)
def test_a_termination_that_is_not_an_end_is_as_in_torchrl(name):
    tensors, done, _ = steps(4, (2, 12, 1))
    terminated = steps(5, (2, 12, 1))[1]
    assert bool((terminated & ~done).any())
    found = results(getattr(ours, name), name, tensors, done, terminated, -2)
    expected = results(getattr(theirs, name), name, tensors, done, terminated, -2)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision_and_dtype(name, dtype):
    tensors, done, terminated = steps(6, (4, 200, 1), dtype, ends=0.02)
    found = results(getattr(ours, name), name, tensors, done, terminated, -2, grad=False)
    wide = {key: tensor.double() for key, tensor in tensors.items()}
    exact = results(getattr(theirs, name), name, wide, done, terminated, -2, grad=False)
    unit = torch.finfo(dtype).eps
    for value, wanted in zip(found, exact, strict=True):
        assert value.dtype is dtype
        # One rounding of what comes back, and a few in float32 of each of some ten steps' worth of rewards.
        limit = unit * wanted.abs() + 64 * torch.finfo(torch.float32).eps
        assert bool(((value.double() - wanted).abs() <= limit).all())


@pytest.mark.parametrize("name", NAMES)
def test_gradcheck(name):
    tensors, done, terminated = steps(7, (2, 5, 2))
    given = arguments(name, tensors)
    keys = (*NAMES[name], "reward")

    def fn(*leaves):
        return getattr(ours, name)(
            **{**given, **dict(zip(keys, leaves, strict=True))}, done=done, terminated=terminated
        )

    assert torch.autograd.gradcheck(fn, [given[key].clone().requires_grad_() for key in keys])


@pytest.mark.parametrize("kind", ["buffer", "per step"])
@pytest.mark.parametrize("name", ["generalized_advantage_estimate", "td_lambda_return_estimate"])
def test_gamma_and_lambda_as_tensors(name, kind):
    shape = (3, 15, 1)
    tensors, done, terminated = steps(8, shape)
    generator = torch.Generator().manual_seed(9)
    size = () if kind == "buffer" else shape
    factors = {
        key: 0.5 + 0.5 * torch.rand(size, generator=generator, dtype=torch.float64)
        for key in ("gamma", "lmbda")
    }
    found = results(getattr(ours, name), name, tensors, done, terminated, -2, **factors)
    expected = results(getattr(theirs, name), name, tensors, done, terminated, -2, **factors)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_td0_is_lambda_0():
    tensors, done, terminated = steps(10, (2, 9, 1))
    value, reward = tensors["next_state_value"], tensors["reward"]
    found = ours.td_lambda_return_estimate(0.9, 0.0, value, reward, done, terminated)
    torch.testing.assert_close(found, theirs.td0_return_estimate(0.9, value, reward, terminated))


@pytest.mark.parametrize("name", ["td_lambda_return_estimate", "td1_return_estimate"])
def test_a_gamma_that_does_not_roll_is_torchrls(name):
    tensors, done, terminated = steps(11, (2, 9, 1))
    gamma = torch.linspace(0.5, 1, 18, dtype=torch.float64).view(2, 9, 1)
    given = {**arguments(name, tensors), "gamma": gamma, "done": done, "terminated": terminated}
    found, expected = (getattr(m, name)(**given, rolling_gamma=False) for m in (ours, theirs))
    assert torch.equal(found, expected)
    assert not torch.equal(found, getattr(ours, name)(**given))


def test_a_gamma_that_does_not_roll_is_a_row_for_each_step():
    """The lines of docs/frameworks/torchrl.md."""
    tensors, done, _ = steps(14, (2, 9, 1))
    value, reward = tensors["next_state_value"], tensors["reward"]
    gamma = torch.linspace(0.5, 1, 18, dtype=torch.float64).view(2, 9, 1)
    batch, width = gamma.shape[:2]
    each = gamma.reshape(batch * width, 1, 1).expand(-1, width, 1)
    again = (x.repeat_interleave(width, 0) for x in (value, reward, done))
    found = ours.td_lambda_return_estimate(each, 0.8, *again).view(batch, width, width)
    found = found.diagonal(dim1=1, dim2=2)[..., None]
    expected = theirs.td_lambda_return_estimate(gamma, 0.8, value, reward, done, rolling_gamma=False)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("rho", "c"), [(0.8, 0.6), (2.0, 1.5), (torch.tensor(1.2), torch.tensor(0.9))])
def test_thresholds_of_vtrace(rho, c):
    name = "vtrace_advantage_estimate"
    batch = steps(12, (3, 16, 2))
    found = results(ours.vtrace_advantage_estimate, name, *batch, -2, rho_thresh=rho, c_thresh=c)
    expected = results(theirs.vtrace_advantage_estimate, name, *batch, -2, rho_thresh=rho, c_thresh=c)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)  # of thresholds in float32


def test_a_threshold_per_step_is_named():
    tensors, done, terminated = steps(12, (3, 16, 2))
    for name in ("rho_thresh", "c_thresh"):
        given = {**arguments("vtrace_advantage_estimate", tensors), name: torch.ones(3, 16, 2)}
        with pytest.raises(ValueError, match=rf"{name}: got shape \[3, 16, 2\], want a number"):
            ours.vtrace_advantage_estimate(**given, done=done, terminated=terminated)


@pytest.mark.parametrize(
    ("shape", "time_dim"), [((3, 14, 1), -2), ((2, 3, 9, 2), -2), ((12, 2), 0), ((5, 12), -1)]
)
@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_reward_to_go(shape, time_dim, gamma):
    tensors, done, _ = steps(13, shape)
    found = ours.reward2go(tensors["reward"], done, gamma, time_dim=time_dim)
    expected = torch.zeros(shape, dtype=torch.float64).movedim(time_dim, 0)
    ahead = torch.zeros_like(expected[0])
    rewards, ends = tensors["reward"].movedim(time_dim, 0), done.movedim(time_dim, 0)
    for t in reversed(range(len(rewards))):
        ahead = expected[t] = rewards[t] + gamma * torch.where(ends[t], 0, ahead)
    torch.testing.assert_close(found, expected.movedim(0, time_dim), rtol=1e-12, atol=1e-12)
    if time_dim == -2 and len(shape) == 3:
        whole = theirs.reward2go(tensors["reward"].float(), done, gamma)
        torch.testing.assert_close(found.float(), whole, rtol=1e-5, atol=1e-5)


def test_what_follows_a_termination_is_not_read():
    name = "generalized_advantage_estimate"
    tensors, done, terminated = steps(14, (2, 12, 1))
    expected = results(getattr(ours, name), name, tensors, done, terminated, -2)
    tensors["next_state_value"] = torch.where(terminated, torch.nan, tensors["next_state_value"])
    for fn in ("generalized_advantage_estimate", "td_lambda_return_estimate", "vtrace_advantage_estimate"):
        for value in results(getattr(ours, fn), fn, tensors, done, terminated, -2):
            assert bool(value.isfinite().all())
    assert torch.equal(results(getattr(ours, name), name, tensors, done, terminated, -2)[0], expected[0])


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_read_back_from_a_device(name):
    """A fake tensor has no data: whoever asks for it is refused."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        shape = (3, 8, 1)
        tensors = {
            key: torch.randn(shape, device="meta")
            for key in ("state_value", "next_state_value", "reward", "log_pi", "log_mu")
        }
        flags = torch.zeros(shape, dtype=torch.bool, device="meta")
        given = arguments(name, tensors)
        if "lmbda" in given:
            given["lmbda"] = torch.full((), 0.9, device="meta")
        given["gamma"] = torch.full((), 0.9, device="meta")
        out = getattr(ours, name)(**given, done=flags, terminated=flags)
    out = out if isinstance(out, tuple) else (out,)
    assert all(o.shape == shape for o in out)


def test_wrong_arguments_are_named():
    tensors, done, terminated = steps(15, (2, 6, 1))
    given = arguments("generalized_advantage_estimate", tensors)
    fn = functools.partial(ours.generalized_advantage_estimate, done=done, terminated=terminated)
    with pytest.raises(ValueError, match=r"state_value: got shape \[2, 5, 1\], want \[2, 6, 1\]"):
        fn(**{**given, "state_value": given["state_value"][:, 1:]})
    with pytest.raises(TypeError, match=r"done: got dtype torch\.int64, want bool"):
        fn(**{**given, "done": done.long()})
    with pytest.raises(ValueError, match="time_dim: got 3"):
        fn(**given, time_dim=3)
    with pytest.raises(ValueError, match=r"gamma: got shape \[2\]"):
        fn(**{**given, "gamma": torch.ones(2)})


# ---- estimators ----------------------------------------------------------------------------------------------


def rollout(seed, shape=(4, 25)):
    tensors, done, terminated = steps(seed, (*shape, 1), torch.float32, ends=0.1)
    generator = torch.Generator().manual_seed(seed + 1)
    observed, following = torch.randn(2, *shape, 3, generator=generator)
    return TensorDict(
        {
            "obs": observed,
            "done": done,
            "terminated": terminated,
            "next": {
                "obs": following,
                "reward": tensors["reward"],
                "done": done,
                "terminated": terminated,
            },
        },
        batch_size=shape,
        names=[None, "time"],
    )


def critic():
    torch.manual_seed(0)
    return TensorDictModule(torch.nn.Linear(3, 1), in_keys=["obs"], out_keys=["state_value"])


@pytest.fixture
def patched():
    undo = ours.patch()
    yield
    undo()


ESTIMATORS = {
    "GAE": lambda: GAE(gamma=0.98, lmbda=0.9, value_network=critic(), vectorized=True),
    "GAE, averaged": lambda: GAE(
        gamma=0.98, lmbda=0.9, value_network=critic(), vectorized=False, average_gae=True
    ),
    "GAE, differentiable": lambda: GAE(
        gamma=0.98, lmbda=0.9, value_network=critic(), vectorized=True, differentiable=True
    ),
    "TDLambda": lambda: TDLambdaEstimator(gamma=0.98, lmbda=0.9, value_network=critic(), vectorized=True),
    "TD1": lambda: TD1Estimator(gamma=0.98, value_network=critic()),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_in_their_place(name, monkeypatch):
    expected = ESTIMATORS[name]()(rollout(20))
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return rewardops_returns(*args, **kwargs)

    rewardops_returns = ours.rewardops.discounted_returns
    monkeypatch.setattr(ours.rewardops, "discounted_returns", counted)
    undo = ours.patch()
    try:
        found = ESTIMATORS[name]()(rollout(20))
    finally:
        undo()
    assert calls
    for key in ("advantage", "value_target"):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-4, atol=2e-5)
        assert found[key].dtype is torch.float32


def test_a_loss_by_the_patched_estimator(patched):
    from torchrl.modules import ProbabilisticActor
    from torchrl.objectives import ClipPPOLoss

    torch.manual_seed(0)
    actor = ProbabilisticActor(
        TensorDictModule(torch.nn.Linear(3, 4), in_keys=["obs"], out_keys=["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    loss = ClipPPOLoss(actor, critic())
    loss.make_value_estimator(gamma=0.98, lmbda=0.9)
    with torch.no_grad():
        data = actor(rollout(21))
    loss(data)["loss_critic"].backward()
    loss.value_estimator(data, params=loss.critic_network_params)
    undone = rollout(21)
    value = undone.set("state_value", data["state_value"])["state_value"]
    expected = theirs_before_patching(
        0.98, 0.9, value, data["next", "state_value"], undone["next", "reward"],
        undone["next", "done"], undone["next", "terminated"],
    )  # fmt: skip
    torch.testing.assert_close(data["advantage"], expected[0], rtol=1e-5, atol=1e-5)


def vtrace(**numbers):
    actor = TensorDictModule(torch.nn.Linear(3, 2), in_keys=["obs"], out_keys=["logits"])
    return VTrace(**{"gamma": 0.9, **numbers}, actor_network=actor, value_network=critic())


WRONG = {
    "gamma: got 1.5, want": lambda: GAE(gamma=1.5, lmbda=0.9, value_network=critic()),
    "lmbda: got -0.5, want": lambda: GAE(gamma=0.9, lmbda=-0.5, value_network=critic()),
    "gamma: got nan, want": lambda: TD1Estimator(gamma=float("nan"), value_network=critic()),
    "lmbda: got 2, want": lambda: TDLambdaEstimator(gamma=0.9, lmbda=2, value_network=critic()),
    "gamma: got some outside, want": lambda: GAE(
        gamma=torch.tensor([0.5, 1.5]), lmbda=0.9, value_network=critic()
    ),
    "gamma: got 3.0, want": lambda: vtrace(gamma=3.0),
    "rho_thresh: got -1.0, want": lambda: vtrace(rho_thresh=-1.0),
    r"c_thresh: got shape \[2\], want": lambda: vtrace(c_thresh=torch.ones(2)),
}


@pytest.mark.parametrize("message", WRONG)
def test_numbers_of_an_estimator_are_checked_as_it_is_built(message, patched):
    with pytest.raises(ValueError, match=f"^{message}"):
        WRONG[message]()


def test_a_loss_checks_the_numbers_of_its_estimator(patched):
    from torchrl.objectives import PPOLoss
    from torchrl.objectives.utils import ValueEstimators

    actor = TensorDictModule(torch.nn.Linear(3, 2), in_keys=["obs"], out_keys=["loc", "scale"])
    loss = PPOLoss(actor, critic())
    with pytest.raises(ValueError, match="gamma: got 2"):
        loss.make_value_estimator(ValueEstimators.TDLambda, gamma=2)


def test_torchrls_own_estimators_are_not_checked():
    ours.patch()()
    for build in WRONG.values():
        build()


theirs_before_patching = theirs.generalized_advantage_estimate


def test_patch_and_undo():
    before = {name: getattr(theirs, name) for name in ours._OURS}
    undo = ours.patch()
    assert advantages.vec_generalized_advantage_estimate is ours.generalized_advantage_estimate
    assert theirs.reward2go is ours.reward2go
    undo()
    assert before == {name: getattr(theirs, name) for name in ours._OURS}
    assert advantages.vec_generalized_advantage_estimate is before["vec_generalized_advantage_estimate"]
