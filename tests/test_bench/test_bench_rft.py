"""Every side takes the same step of GRPO: equal gradients from the same ids, and honest counts."""

import ast
import importlib
import importlib.metadata
import importlib.util
import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopersrm import InputError
from nanopersrm.bench import bench_grpo, bench_rft, bench_trl, bench_turns
from nanopersrm.bench.bench_ours import write_base
from nanopersrm.bench.bench_rft import OURS, SIDES, Config
from nanopersrm.bench.bench_turns import Turns, reward
from nanopersrm.model import weights

VERSION = "1.16.0"
HERE = importlib.util.find_spec("trl") is not None
with_trl = pytest.mark.skipif(
    not HERE or importlib.metadata.version("trl") != VERSION, reason=f"needs trl {VERSION}"
)
CPU = torch.device("cpu")
G, P, R = 3, 20, 5
SIZES = weights.SHAPES["smollm2-135m"] | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 131,
}


@pytest.fixture
def tiny(tmp_path) -> Config:
    """A model of some thousand weights in fp32, and a learning rate that moves it at once."""
    model = weights.random(SIZES, torch.float32, CPU, seed=0)
    folder = write_base(model, SIZES, tmp_path / "tiny")
    return Config(base=folder, group=G, prompt=P, reply=R, rounds=1, rank=4, lr=1e-2, dtype="fp32")


def our_side(config: Config, sharing: bool) -> bench_grpo.Ours:
    model = bench_grpo.load(config.base, None, config.settings, torch.float32, CPU, config.seed)
    return bench_grpo.Ours(
        model, config.settings, config.lora, config.lr, config.seed, sharing=sharing
    )


def answers(turns: Turns) -> list[dict[str, Any]]:
    assert isinstance(turns.answers, io.StringIO)
    return [json.loads(line) for line in turns.answers.getvalue().splitlines()]


def own_turns(steps: int) -> Turns:
    return Turns(CPU, io.StringIO("go\n" * steps), io.StringIO())


def some_replies() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(130) for _ in range(R)] for _ in range(G)]


# Both sides


@with_trl
@pytest.mark.parametrize("name", bench_trl.SIDES)
def test_the_same_ids_give_the_same_gradient(name, tiny, tmp_path, monkeypatch):
    """TRL draws and trains a step; ours trains on its replies. Moments are shares of gradients."""
    inner = importlib.import_module("trl.trainer.utils")
    before = inner._use_triton
    monkeypatch.setattr(inner, "_use_triton", before)  # as it was, after the test
    job = bench_rft.write_job(tiny, tmp_path)
    job["prompts"] = job["prompts"][:1]
    turns = own_turns(1)
    made = bench_trl.trainer(job, name, bench_trl.load(job), turns, tmp_path / "out")
    assert made.args.gradient_checkpointing == (name != "trl-fast")
    assert (inner._use_triton is before) == (name == "trl")
    made.train()
    (answer,) = answers(turns)
    replies = answer["replies"]
    assert [len(ids) for ids in replies] == [R] * G
    assert len({tuple(ids) for ids in replies}) == G
    assert answer["rows_drawing"] == G * (P + R - 1)  # with a cache, although in training
    assert answer["rows_training"] == G * (P + R)
    theirs = {
        n.removeprefix("base_model.model.model.").replace(".lora_B.default.weight", ""): p
        for n, p in made.model.named_parameters()
        if "lora_B" in n
    }
    assert all(p.abs().max() > 0 and p.dtype == torch.float32 for p in theirs.values())
    moments = made.optimizer.optimizer.state
    rewards = [reward(ids) for ids in replies]
    for sharing in (True, False):
        side = our_side(tiny, sharing)
        loss = side.train(job["prompts"][0], replies, rewards)
        assert abs(loss) < 1e-5  # the ratio is 1, advantages add up to 0, lengths are equal
        assert side.lora.masters.keys() == theirs.keys()
        for key, (_, B) in side.lora.masters.items():
            ours, their = side.optimizer.state[B]["exp_avg"], moments[theirs[key]]["exp_avg"]
            assert their.abs().max() > 0
            torch.testing.assert_close(ours, their, rtol=1e-3, atol=1e-3 * float(their.abs().max()))
            torch.testing.assert_close(B.detach().abs().max(), theirs[key].detach().abs().max())


@with_trl
def test_in_4_bits_both_sides_learn(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    job = bench_rft.write_job(replace(tiny, nf4=True, dtype="bf16"), tmp_path)
    turns = own_turns(2)
    made = bench_trl.trainer(job, "trl", bench_trl.load(job), turns, tmp_path / "out")
    made.train()
    named = dict(made.model.named_parameters())
    learned = {name: p for name, p in named.items() if "lora_B" in name}
    turns.ended(1, [p for name, p in named.items() if "lora_" not in name], learned)
    *steps, end = answers(turns)
    assert [step["rows_drawing"] for step in steps] == [G * (P + R - 1)] * 2
    assert end["moved"] > 1e-3
    assert (end["base"], end["adapter"]) == (["bfloat16", "uint8"], ["bfloat16"])
    side = our_side(replace(tiny, nf4=True), True)
    side.train(job["prompts"][0], steps[0]["replies"], [0.0, 1.0, 0.5])
    assert all(B.abs().max() > 1e-3 for _, B in side.lora.masters.values())


@with_trl
def test_the_whole_script_in_processes_of_their_own(tiny, tmp_path, capfd):
    out = tmp_path / "all.json"
    bench_rft.main(replace(tiny, sides=("ours", "trl"), out=out))
    printed = capfd.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    assert list(found["sides"]) == ["ours", "trl"]
    for name, side in found["sides"].items():
        assert f"| {name} " in printed
        assert len(side["rounds"]) == 1
        assert side["peak"] > side["loaded"] > 10_000_000
        assert side["moved"] > 1e-3
        assert (side["base"], side["adapter"]) == (["float32"], ["float32"])
        assert ("kernels.process" in side["of_ours"]) == (name in OURS)
    theirs = {"nanopersrm"} | {f"nanopersrm.bench_{n}" for n in ("peers", "trl", "turns")}
    assert set(found["sides"]["trl"]["of_ours"]) == theirs
    assert f"peak memory (goal {bench_rft.GOALS['memory']})" in printed
    assert f"trl {VERSION}" in printed


def test_their_files_import_nothing_of_ours():
    allowed = {"nanopersrm.bench.bench_peers", "nanopersrm.bench.bench_turns"}
    for module in (bench_trl, bench_turns):
        tree = ast.parse(Path(module.__file__ or "").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            ours = {n for n in names if n.split(".")[0] in bench_turns.OF_OURS}
            assert ours <= allowed


@with_trl
def test_prompts_reach_trl_as_the_ids_they_are():
    tokenizer = bench_trl.number_tokenizer(131)
    ids = [0, 10, 129, 2, 2, 77, 101, 1]
    assert tokenizer(text=[bench_trl.text(ids)])["input_ids"] == [ids]
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 130
    assert max(max(row) for row in bench_rft.prompts(Config(), 131)) == 129


# Ours


@pytest.mark.parametrize(("name", "rows"), [("ours", P + G * R), ("ours-whole", G * (P + R))])
def test_a_step_of_ours(name, rows, tiny):
    side = our_side(tiny, name == "ours")
    turns = own_turns(1)
    side.model.register_forward_pre_hook(lambda _, args: turns.count(args[0]))
    prompt = bench_rft.prompts(tiny, 131)[0]
    side.step(prompt, G, R, 0, turns)
    (answer,) = answers(turns)
    assert [len(ids) for ids in answer["replies"]] == [R] * G
    assert (answer["rows_drawing"], answer["rows_training"]) == (P + G * (R - 1), rows)
    assert answer["seconds"] == answer["drawing"] + answer["training"]
    assert all(B.abs().max() > 0 for _, B in side.lora.masters.values())


def test_sharing_the_prompt_changes_no_gradient(tiny):
    replies = some_replies()
    moments = []
    for sharing, budget in ((True, 4096), (False, 4096), (False, P + R)):
        side = our_side(replace(tiny, budget=budget), sharing)
        side.train([7] * P, replies, [0.0, 1.0, 0.5])
        moments.append(
            torch.cat(
                [side.optimizer.state[p]["exp_avg"].flatten() for p in side.lora.parameters()]
            )
        )
    size = float(moments[0].abs().max())
    assert size > 0
    for other in moments[1:]:
        torch.testing.assert_close(other, moments[0], rtol=1e-4, atol=1e-4 * size)


# The clock


def test_rewards_differ_and_are_fixed():
    assert reward([3, 5, 7]) == (3 + 2 * 5 + 3 * 7) / 1008
    assert reward([1000, 5]) == (1010 - 1009) / 1008
    assert len({reward(ids) for ids in some_replies()}) == G


def test_turns_by_hand(monkeypatch):
    times = iter([10.0, 13.0, 18.0])
    monkeypatch.setattr(bench_turns, "now", lambda _: next(times))
    turns = own_turns(1)
    turns.count(torch.zeros(99))  # before the turn: nobody's
    turns.wait()
    turns.count(torch.zeros(2, 3))
    assert turns.drawn([[1, 2], [3, 4]]) == [5 / 1008, 11 / 1008]
    turns.count(torch.zeros(10))
    turns.done()
    turns.ended(
        1, [torch.zeros(1, dtype=torch.bfloat16)], {"a": -torch.ones(2), "b": torch.ones(1) * 3}
    )
    step, end = answers(turns)
    assert (step["drawing"], step["training"], step["seconds"]) == (3.0, 5.0, 8.0)
    assert (step["rows_drawing"], step["rows_training"]) == (6, 10)
    assert (end["loaded"], end["moved"]) == (1, 1.0)
    assert (end["base"], end["adapter"]) == (["bfloat16"], ["float32"])
    with pytest.raises(SystemExit):
        turns.wait()  # nobody asks any more


def test_a_side_that_fails_is_named():
    for command, message in (("exit 3", "code 3: see above"), ("kill -9 $$", "-9: it was killed")):
        side = bench_turns.Side("broken", ["bash", "-c", command], {})
        with pytest.raises(bench_turns.Ended, match=f"broken has ended with .*{message}"):
            side.hear()
        side.end()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"replies": [[1] * R] * (G - 1)}, "expected 3 replies of 5 tokens"),
        ({"replies": [[1] * (R - 1)] * G}, "expected 3 replies of 5 tokens"),
        ({"rows_drawing": G * (P + R) + 1}, "there is no cache"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for(change, message):
    config = Config(group=G, prompt=P, reply=R)
    sound = {"replies": [[1] * R] * G, "rows_drawing": G * (P + R - 1)}
    assert bench_rft.checked(config, "trl", dict(sound)) == {"rows_drawing": G * (P + R - 1)}
    with pytest.raises(AssertionError, match=message):
        bench_rft.checked(config, "trl", sound | change)


# The script


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sides": ("trl",)}, "--sides: expected ours among them, got trl"),
        ({"sides": ("ours", "verl")}, "--sides: expected ours, ours-whole, .*, got 'verl'"),
        ({"shape": "gpt-2"}, "--shape: expected .*qwen2.5-7b.*, got 'gpt-2'"),
        ({"preset": "16gb"}, "--preset: expected .*24gb.*, got '16gb'"),
        ({"dtype": "int8"}, "--dtype: expected bf16, fp32, got 'int8'"),
        ({"group": 1}, "--group: expected at least 2, got 1"),
        ({"prompt": 15}, "--prompt: expected at least 16, got 15"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(InputError, match=message):
        Config(**flags)


def test_ratios_by_hand():
    def side(drawing: list[float], training: list[float], loaded: int, peak: int) -> dict[str, Any]:
        rounds = [
            {"drawing": d, "training": t, "seconds": d + t, "rows_drawing": 7, "rows_training": 9}
            for d, t in zip(drawing, training, strict=True)
        ]
        facts = {"base": ["bfloat16"], "adapter": ["float32"], "moved": 1.0}
        return {"rounds": rounds, "loaded": loaded, "peak": peak} | facts

    sides = {
        "ours": side([1, 1, 2], [1, 3, 2], 1 * 10**9, 2 * 10**9),
        "ours-whole": side([1, 1, 2], [2, 9, 6], 1 * 10**9, 3 * 10**9),
        "trl": side([2, 3, 8], [4, 5, 4], 1 * 10**9, 5 * 10**9),
    }
    config = Config(rounds=3, group=2, reply=6, sides=SIDES)
    report = bench_rft.report(config, {"sides": sides, "machine": "a box", "load": 0.5})
    told = [[c.strip() for c in line.split("|")[1:-1]] for line in report.splitlines()[:5]]
    assert " ".join(told[4]) == "trl 3.00 4.00 8.00 3.00 x 2 4.00 0.25 x 5.00 0.40 x 7 + 9"
    borders = {tuple(i for i, c in enumerate(row) if c == "|") for row in report.splitlines()[:5]}
    assert len(borders) == 1  # straight columns
    assert (
        "Against trl: 3.00 x faster (goal 2.5), drawing 3.00 x, training 2.00 x; 0.40 x" in report
    )
    assert "with the prompt shared: 3.00 x faster (goal 1.7)" in report
