"""The demo: its checker, a quick run of every recipe, and drawings of rollouts from a file."""

from __future__ import annotations

import json
import re

import pytest
import torch

from rewardops.demo import rollouts, task, train
from rewardops.demo.__main__ import main
from rewardops.demo.policy import Policy
from rewardops.recipes import RECIPES

pytestmark = pytest.mark.slow
PROBLEM = task.Problem(347, 285, 3)
RIGHT = "7+5+0=12;4+8+1=13;3+2+1=06;#632$"


def test_the_worked_solution():
    assert PROBLEM.prompt == "347+285:"
    assert PROBLEM.solution == RIGHT
    assert task.Problem(99, 99, 2).solution == "9+9+0=18;9+9+1=19;#198$"
    assert task.decode(task.encode(RIGHT)) == RIGHT


@pytest.mark.parametrize(
    ("response", "right", "steps"),
    [
        (RIGHT, True, [1, 1, 1, 1]),
        ("7+5+0=12;4+8+0=12;3+2+1=06;#632$", True, [1, 0, 1, 1]),  # a forgotten carry, a correct answer
        ("7+5+0=12;4+8+1=13;3+2+1=06;#633$", False, [1, 1, 1, 0]),
        ("7+5+0=12;4+8+1", False, [1, 0]),  # truncated
        ("#632$", True, [0]),  # no worked columns: not the expected step
        ("7+5+0=12;#632$", True, [1, 0]),
        ("", False, []),
        ("7+5+0=12;" * 5, False, [1, 0, 0, 0, 0]),
    ],
)
def test_the_checker(response, right, steps):
    verdict = task.check(PROBLEM, response)
    assert verdict.right == right
    assert verdict.step_rewards == steps
    assert all(response[e] in ";$" or e == len(response) - 1 for e in verdict.ends)


def test_held_out_problems_are_never_trained_on():
    trained = {(p.a, p.b) for seed in range(20) for p in task.problems(200, 3, seed)}
    held = {(p.a, p.b) for p in task.problems(500, 3, 7, held_out=True)}
    assert not trained & held
    assert task.problems(5, 3, 1) == task.problems(5, 3, 1)


def test_sampling_with_a_cache_is_the_same_policy():
    torch.manual_seed(0)
    policy = Policy(16, 2, 2, 30)
    prompts = torch.tensor([task.encode("12+34:"), task.encode("99+11:")])
    ids = policy.sample(prompts, 12, 0.0)
    for t in range(6, 18):
        want = policy(ids[:, :t])[:, -1].argmax(-1)
        running = ~(ids[:, 6:t] == task.END).any(1)
        assert torch.equal(ids[running, t], want[running])


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_quick_run_is_reproducible_and_reported(recipe, tmp_path, capsys):
    texts = []
    for k in range(2):
        assert main(["--quick", "--recipe", recipe, "--seed", "3", "--out", str(tmp_path / str(k))]) == 0
        html = (tmp_path / str(k) / "index.html").read_text()
        texts.append(re.sub(r"\d+ s in all|<table>.*?</table>", "", html))  # the seconds differ
    assert texts[0] == texts[1]
    out = capsys.readouterr().out
    assert "accuracy before" in out
    assert "ops share" in out
    for part in ("<svg", "held-out accuracy", 'class="t', "advantage", "prefix value", f"<h3>{recipe}"):
        assert part in texts[0]
    assert "nan" not in texts[0].lower().replace("nants", "")
    assert not re.search(r"(src|href)\s*=|url\(|@import", texts[0])


def test_compare_draws_every_recipe(tmp_path):
    assert main(["--quick", "--compare", "--out", str(tmp_path)]) == 0
    html = (tmp_path / "index.html").read_text()
    for recipe in RECIPES:
        assert f"<h3>{recipe}" in html


def test_credit_of_every_recipe_is_finite_and_masked():
    s = train.QUICK
    held_out = task.problems(s.held_out, s.digits, 7, held_out=True)
    policy, _ = train.warm_up(s, held_out, lambda items, _: items)
    ids = train.roll_out(policy, held_out[:4], s, torch.Generator().manual_seed(0))
    batch = train.judge(ids, held_out[:4], s)
    batch = train.with_entropy(batch, torch.rand(batch.tokens.shape))
    batch.rewards[::2] = 1.0
    for name, credit in RECIPES.items():
        advantages = credit(batch)
        assert advantages.shape == batch.tokens.shape, name
        assert advantages.isfinite().all(), name
        assert bool((advantages[~batch.mask] == 0).all()), name
        assert bool((advantages != 0).any()), name


def write(path, records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


RECORDS = [
    {"group": "a", "response": "one two\nthree 4", "reward": 1, "step_rewards": [1, 0.5]},
    {"group": "a", "response": "one two\nfour 5", "reward": 0.0, "step_rewards": [1, None]},
    {"group": 7, "response": "alone", "reward": 0.25, "step_rewards": [0]},
]


def test_rollouts_with_step_rewards(tmp_path, capsys):
    path = write(tmp_path / "r.jsonl", RECORDS)
    assert main(["--rollouts", str(path), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "groups: 2" in out
    assert "GTPO is left out" in out
    html = (tmp_path / "out" / "index.html").read_text()
    for part in ("<h3>grpo", "<h3>tempo", "<h3>pure", "Group a", "branch", "2 rows become 1"):
        assert part in html
    assert "<h3>gtpo" not in html


def test_rollouts_with_tokens_and_logprobs(tmp_path, capsys):
    records = [
        {"group": 0, "tokens": [5, 6, 7], "reward": 1, "logprobs": [-0.1, -0.2, -0.3]},
        {"group": 0, "tokens": [5, 8], "reward": 0, "logprobs": [-0.1, -2.0]},
    ]
    assert main(["--rollouts", str(write(tmp_path / "r.jsonl", records)), "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "surprisal" in out
    assert "PURE is left out" in out
    assert "<h3>gtpo" in (tmp_path / "index.html").read_text()


def test_a_named_group(tmp_path):
    path = write(tmp_path / "r.jsonl", RECORDS)
    assert main(["--rollouts", str(path), "--group", "7", "--out", str(tmp_path)]) == 0
    html = (tmp_path / "index.html").read_text()
    assert "Group 7" in html
    assert "Group a" not in html


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1]", "line 2: got list, want an object"),
        ({"response": "x", "reward": 1}, "line 2: group is missing"),
        ({"group": 1, "response": "x"}, "line 2: reward is missing"),
        ({"group": 1, "response": "x", "reward": "high"}, "line 2: reward: got 'high'"),
        ({"group": 1, "response": "x", "reward": float("nan")}, "line 2: reward: got nan"),
        ({"group": 1, "reward": 1}, "line 2: response is missing"),
        ({"group": 1, "tokens": [1.5], "reward": 1}, "line 2: tokens"),
        (
            {"group": 1, "response": "x\ny", "reward": 1, "step_rewards": [1]},
            "step_rewards: got 1 entries, want 2",
        ),
        ({"group": 1, "tokens": [1, 2], "reward": 1, "logprobs": [0]}, "logprobs: got 1 entries"),
    ],
)
def test_bad_rollouts_name_the_line_and_the_field(tmp_path, capsys, record, message):
    path = write(tmp_path / "r.jsonl", [RECORDS[0], record])
    assert main(["--rollouts", str(path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_other_bad_arguments(tmp_path, capsys):
    assert main(["--rollouts", str(tmp_path / "none.jsonl")]) == 2
    assert main(["--rollouts", str(write(tmp_path / "e.jsonl", [""]))]) == 2
    path = write(tmp_path / "r.jsonl", RECORDS)
    assert main(["--rollouts", str(path), "--group", "zebra"]) == 2
    assert "no group 'zebra'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--updates", "0"])


def test_real_rollouts(shared, tmp_path, capsys):
    path = shared / "data" / "gsm8k_rollouts.jsonl"
    assert main(["--rollouts", str(path), "--groups", "2", "--out", str(tmp_path)]) == 0
    assert "responses: 5,276" in capsys.readouterr().out
    html = (tmp_path / "index.html").read_text()
    assert html.count("<h3>pure") == 2


def test_pieces_of_text_come_together_again():
    text = "He ate 12 eggs, $3.50!\n\nA: x_1  y\n"
    assert "".join(rollouts._PIECES.findall(text)) == text
