"""Groups in which nobody is above the others: how train_rft.py says so, and that the tiny preset,
whose model is random, has others."""

import json
from pathlib import Path

import pytest
from test_train_rft import here, make_quick, write_given

from nanopersrm import InputError
from nanopersrm.judge import verdict
from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.model.bases import DEFAULT_BASE, resolve
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.train import setup as starting
from nanopersrm.train import source as sourcing
from nanopersrm.train.ending import said_of_untaught
from nanopersrm.train.harvest import Harvest, Yield
from nanopersrm.train.plans import Asked
from nanopersrm.train.rewards import Reward, Rollout
from nanopersrm.train.rollouts import Drawn

PART = {"format": 1.0, "order": 0.5}


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").open()]


@pytest.mark.base
def test_the_tiny_preset_learns_something(tmp_path, capsys):
    """No adapter, no base, no pairs: replies that parse and replies that do not, and a gradient."""
    few = ("--eval-pairs", "2", "--reason-pairs", "0", "--steps", "6")
    assert here("--preset", "tiny", "--out", tmp_path, *few) == 0
    found = lines(tmp_path)
    assert {line["groups_drawn"] for line in found} == {4}
    telling = [line for line in found if line["groups_flat"] < 4]
    assert telling
    for line in telling:
        assert 0 < line["formed"] < 1
        assert line["gradient_norm"] > 0
    out = capsys.readouterr().out
    assert out.count("taught nothing: no reply is above its group") == len(found) - len(telling)


@pytest.mark.base
def test_a_reply_of_the_tiny_model_parses():
    """The table that its head is made of leads through the form."""
    tokenizer = Tokenizer.load(resolve(DEFAULT_BASE))
    text = "".join((*starting.REPLY, "7", *starting.END))
    assert verdict.parse(verdict.OPEN + text, "A").scores == {"A": 7}
    for piece in (*starting.REPLY, *starting.END):
        assert len(tokenizer.encode(piece)) == 1, piece


@pytest.mark.parametrize("formed", [0.0, 1.0])
def test_a_run_of_flat_groups_says_so(formed, tmp_path, monkeypatch, capsys):
    """Each step, and once at the end, with what helps."""
    make_quick(monkeypatch)
    same = Reward(PART, 1.5, None) if formed else Reward(dict.fromkeys(PART, 0.0), 0.0, "no score")

    def all_the_same(plan, config):
        return [
            {role: [same for _ in group] for role, group in one.groups.items()}
            for one in plan.shown
        ]

    monkeypatch.setattr(sourcing, "rewards", all_the_same)
    given = write_given(tmp_path)
    assert here(*given, "--steps", "2", "--eval-pairs", "0", "--out", str(tmp_path / "run")) == 0
    assert [line["groups_flat"] for line in lines(tmp_path / "run")] == [4, 4]
    out = " ".join(capsys.readouterr().out.split())
    assert "step 1 taught nothing: no reply is above its group" in out
    assert "2 of 2 steps taught nothing: no reply did better than its group" in out
    assert ("what can help: --resample 2" in out) == bool(formed)
    assert ("teach the form first, with train_sft.py" in out) == (not formed)


def test_steps_that_taught_say_nothing():
    assert said_of_untaught([{"flat": 0.5, "formed": 1.0}, {"flat": 0.0, "formed": 0.0}], 2) == ""


def test_the_form_is_to_be_taught_only_where_no_step_has_it():
    flat, other = {"flat": 1.0, "formed": 0.0}, {"flat": 0.5, "formed": 0.25}
    assert "teach the form first" in said_of_untaught([flat, flat], 2)
    said = said_of_untaught([flat, other], 2)
    assert said.startswith("1 of 2 steps taught nothing")
    assert "what can help: --resample 2" in said


def worth(*orders: float) -> list[Reward]:
    """A group with these orders; below 0: a reply that does not parse."""
    return [Reward({"order": max(o, 0.0)}, 1.0, None if o >= 0 else "no score") for o in orders]


def plan(*orders: tuple[float, ...]) -> Yield:
    """Groups about chosen and rejected, of a pair and then of its twin."""
    groups = [[Drawn((0,), (0.0,), Rollout("", 1))] * len(own) for own in orders]
    return Yield(Asked("pointwise", (), ()), groups, [worth(*own) for own in orders])


@pytest.mark.parametrize(
    ("orders", "alike", "in_plan"),
    [
        (((0.5, 0.5), (1.0, 0.5)), [True, False], [False]),
        (((0.5, -1, 0.5), (0.5, 0.5)), [True, True], [True]),
        (((0.5, 0.5), (1.0, 1.0)), [True, True], [False]),  # across the plan one is above
        (((0.5, -1), (1.0, 0.5)), [None, False], [False]),
        (((0.0, 0.0), (-1, -1)), [None, None], [None]),  # no rival to be above or below
        (((1.0, 1.0), (-1, 0.0)), [True, None], [False]),
    ],
)
def test_who_has_the_same_order_is_unanimous(orders, alike, in_plan):
    one = plan(*orders)
    assert one.unanimous("prompt") == alike
    assert one.unanimous("plan") == in_plan


def test_the_log_has_the_share_of_groups_that_judge_alike():
    mixed = plan((0.5, 0.5), (1.0, 0.5), (0.5, 0.5), (0.25, 0.25))
    assert Harvest([mixed]).numbers()["unanimous"] == 0.75
    assert Harvest([mixed]).numbers("plan")["unanimous"] == 0
    assert "unanimous" not in Harvest([plan((-1, -1), (-1, 0.0))]).numbers()


def test_a_run_whose_replies_all_judge_alike_is_warned_of():
    early = [{"flat": 0.0, "formed": 1.0, "unanimous": 0.0}] * 20
    late = [{"flat": 0.0, "formed": 1.0, "unanimous": 1.0}] * 8
    assert said_of_untaught([*late, *early], 28) == ""
    unformed = [{"flat": 0.0, "formed": 0.0}] * 8  # nobody judged: no number
    assert said_of_untaught([*late, *unformed], 16) == ""
    said = said_of_untaught([*early, *late], 28)
    assert said.startswith("in 100% of the groups of the last steps all replies had the same order")
    assert said.count("\n") == 1


def made(base: str) -> AdapterSettings:
    found = AdapterSettings.__new__(AdapterSettings)
    vars(found)["base"] = base
    return found


@pytest.mark.base
def test_a_random_model_and_a_real_one_do_not_mix():
    base, folder = resolve(DEFAULT_BASE), Path("mine")
    with pytest.raises(InputError, match="mine: this adapter was trained on a random model: say"):
        starting.same_base(made(starting.RANDOM), folder, base, tiny=False)
    with pytest.raises(InputError, match="mine: this adapter was trained on smol, and --preset ti"):
        starting.same_base(made("smol"), folder, base, tiny=True)
    assert starting.same_base(made(starting.RANDOM), folder, base, tiny=True) is None
    assert starting.same_base(None, None, base, tiny=False) is None
