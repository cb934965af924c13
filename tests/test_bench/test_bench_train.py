"""Every side of the benchmark trains the same: equal losses, the same texts, and honest sums."""

import ast
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nanopersrm import InputError
from nanopersrm.bench import bench_ours, bench_peers, bench_train
from nanopersrm.bench.bench_train import OURS, SIDES, Config
from nanopersrm.model import weights
from nanopersrm.train.packing import Branch, Bundle, Text, grow

pytest.importorskip("peft")

CPU = torch.device("cpu")
V = 131
SIZES = weights.SHAPES["smollm2-135m"] | {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,  # whole blocks of 64: else bitsandbytes is wrong on a CPU
    "vocab_size": V,
}
DIGITS = tuple(range(9))


@pytest.fixture
def tiny(monkeypatch) -> Config:
    """A model of some thousand weights in fp32, and a learning rate that moves it at once."""
    monkeypatch.setitem(weights.SHAPES, "tiny", SIZES)
    return Config(
        shape="tiny", budget=70, pairs_a_step=3, steps=3, rounds=2, rank=4, lr=1e-2, dtype="fp32"
    )


def step(seed: int = 0) -> list[Bundle]:
    """Three pairs of texts that share from 16 to 24 ids."""
    rng = random.Random(seed)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(V) for _ in range(n))

    found = []
    for name in ("a", "b", "c"):
        shared = ids(rng.randint(16, 24))
        prompts = [shared + ids(rng.randint(1, 6)) for _ in range(2)]
        told = [Text(p + ids(rng.randint(2, 9)), len(p)) for p in prompts]
        found.append(grow(name, told))
    return found


def curve(config: Config, job: dict[str, Any], name: str, steps: list[list[Bundle]]) -> list[float]:
    """Losses of a side in this process."""
    if name in OURS:
        model = bench_train.our_model(config, job["base"])
        ours = bench_train.our_side(config, name, model, DIGITS)
        return [ours.step(one) for one in steps]
    peer = bench_peers.Peer(job, name, {})
    return [peer.step(one) for one in job["steps"]]


@pytest.fixture
def job(tiny: Config, tmp_path: Path) -> dict[str, Any]:
    return bench_train.write_job(tiny, [step()] * 3, tmp_path)


def test_the_loss_is_that_of_each_text_run_alone(tiny, job):
    """The first loss, B being zero, from transformers' model without any adapter."""
    plain = bench_peers.load(job, False).requires_grad_(False)
    total, count = 0.0, 0
    for ids, first in bench_ours.texts(step()):
        log_probs = plain(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(log_probs[i - 1, ids[i]]) for i in range(first, len(ids)))
        count += len(ids) - first
    assert curve(tiny, job, "ours", [step()])[0] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("name", [name for name in SIDES if name != "ours"])
def test_all_sides_learn_the_same(name, tiny, job):
    steps = [step()] * 3
    ours = curve(tiny, job, "ours", steps)
    assert ours[2] < ours[0] - 0.05
    other = curve(tiny, job, name, steps)
    assert other == pytest.approx(ours, rel=1e-2 if "autocast" in name else 1e-4)


def test_recompute_changes_no_loss(tiny, tmp_path):
    steps = [step()] * 2
    again = replace(tiny, recompute=True)
    plain = curve(tiny, bench_train.write_job(tiny, steps, tmp_path / "a"), "ours", steps)
    job = bench_train.write_job(again, steps, tmp_path / "b")
    for name in ("ours", "peft-padded", "peft-packed-16bit"):
        assert curve(again, job, name, steps) == pytest.approx(plain, rel=1e-4)


def test_in_4_bits_all_sides_learn_the_same(tiny, tmp_path):
    """bitsandbytes' codes are ours; "prepared" as its users do, or not."""
    pytest.importorskip("bitsandbytes")
    config, steps = replace(tiny, nf4=True, recompute=True), [step()] * 2
    job = bench_train.write_job(config, steps, tmp_path)
    ours = curve(config, job, "ours", steps)
    for name in ("peft-padded", "peft-packed-16bit"):
        assert curve(config, job, name, steps) == pytest.approx(ours, rel=2e-5)
    exact = curve(tiny, bench_train.write_job(tiny, steps, tmp_path / "16"), "ours", steps)
    assert abs(ours[0] / exact[0] - 1) > 1e-4  # it is in 4 bits


def test_peers_that_share_a_base_do_not_disturb_each_other(tiny, job):
    shared: dict[bool, Any] = {}
    peers = [bench_peers.Peer(job, name, shared) for name in ("peft-padded", "peft-single-16bit")]
    assert len(shared) == 1
    curves = [[peer.step(one) for peer in peers] for one in job["steps"]]
    alone = curve(tiny, job, "peft-padded", [])
    for k in range(2):
        assert [both[k] for both in curves] == pytest.approx(alone, rel=1e-4)


def test_a_process_of_theirs_measures_itself_and_has_nothing_of_ours(tiny, tmp_path):
    job = bench_train.write_job(tiny, [step()] * 3, tmp_path)
    found = bench_train.run_alone(tiny, tmp_path, "peft-packed")
    assert found["losses"] == pytest.approx(curve(tiny, job, "ours", [step()] * 3), rel=1e-4)
    assert found["peak"] > found["loaded"] > 10_000_000
    assert len(found["seconds"]) == 3
    tree = ast.parse(Path(bench_peers.__file__).read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not [n for n in names if n.split(".")[0] in ("nanopersrm", "kernels", "data")]


def test_peak_memory_is_that_of_the_fullest_moment():
    class Greedy:
        def step(self, size: int) -> float:
            return float(torch.ones(size, dtype=torch.uint8)[-1])  # touched, then given back

    found = bench_peers.measure(Greedy(), [100_000_000, 1000], CPU)
    assert 99_000_000 <= found["peak"] - found["loaded"] < 130_000_000


# Texts


def test_whole_texts_by_hand():
    """A prefix, under it a candidate with two replies, and a branch that has none."""
    under = Branch((5, 6), 2)
    bundle = Bundle(
        "x",
        (1, 2),
        (under, Branch((7, 8), 1, under=0), Branch((9,), 0, under=0), Branch((3, 4), 2)),
    )
    assert bench_ours.whole(bundle) == [([1, 2, 5, 6, 7, 8], 5), ([1, 2, 5, 6, 9], 4)]
    assert bench_ours.unshared([bundle]) == [
        Bundle("x", (), (Branch((1, 2, 5, 6, 7, 8), 5),)),
        Bundle("x", (), (Branch((1, 2, 5, 6, 9), 4),)),
    ]


def test_micro_batches_by_hand():
    """Texts of 30, 40, 20 and 25 tokens and 80 tokens at most, filling included."""
    texts = [grow(str(n), [Text((1,) * n, n - 1)]) for n in (30, 40, 20, 25)]
    found = bench_ours.for_peers(texts, 80)
    assert found["padded"] == [[0, 1], [2, 3]]  # 2 x 40; a third would come to 120
    assert found["packed"] == [[1, 0], [3, 2]]
    assert [len(ids) for ids, _ in found["texts"]] == [30, 40, 20, 25]
    assert bench_ours.for_peers(texts, 10)["padded"] == [[0], [1], [2], [3]]


# The script


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sides": ("peft-padded",)}, "--sides: expected ours among them, got peft-padded"),
        ({"sides": ("ours", "trl")}, "--sides: expected .*peft-packed-16bit.*, got 'trl'"),
        ({"shape": "gpt-2"}, "--shape: expected .*qwen2.5-7b.*, got 'gpt-2'"),
        ({"preset": "16gb"}, "--preset: expected .*24gb.*, got '16gb'"),
        ({"dtype": "int8"}, "--dtype: expected bf16, fp32, got 'int8'"),
        ({"rounds": 0}, "--rounds: expected at least 1, got 0"),
    ],
)
def test_flags_that_make_no_sense(flags, message):
    with pytest.raises(InputError, match=message):
        Config(**flags)


def test_a_preset_brings_its_settings():
    how = Config(preset="8gb").settings
    assert (how.nf4, how.recompute, how.budget, how.card_gb) == (True, True, 4096, 8.0)
    how = Config(nf4=True, budget=99).settings
    assert (how.nf4, how.recompute, how.budget, how.card_gb) == (True, False, 99, None)


@pytest.mark.base
def test_the_whole_script(tiny, tmp_path, monkeypatch, capsys):
    """On the demo writers, with SmolLM2's ids; each side alone, but in this process."""
    monkeypatch.setitem(weights.SHAPES, "tiny", SIZES | {"vocab_size": 49152})

    def here(config: Config, folder: Path, name: str) -> dict[str, Any]:
        if name in OURS:
            bench_train.alone(str(folder), name)
            return json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        return bench_peers.measure(bench_peers.Peer(job, name, {}), job["steps"], CPU)

    monkeypatch.setattr(bench_train, "run_alone", here)
    sides = ("ours", "peft-padded")
    out = tmp_path / "all.json"
    config = replace(tiny, sides=sides, budget=4096, pairs_a_step=1, steps=1, rounds=1, out=out)
    bench_train.main(config)
    printed = capsys.readouterr().out
    found = json.loads(out.read_text(encoding="utf-8"))
    for name in sides:
        assert f"| {name} | " in printed
        side = found["sides"][name]
        assert len(side["rounds"]) == len(side["losses"]) == 1
        assert side["losses"] == pytest.approx(found["sides"]["ours"]["losses"], rel=1e-3)
    assert all(rows < tokens for rows, tokens in zip(found["rows"], found["tokens"], strict=True))
    assert "Against the fastest of theirs padded, peft-padded: " in printed


def test_ratios_by_hand():
    def side(seconds: list[float], loaded: int, peak: int, losses: list[float]) -> dict[str, Any]:
        return {"rounds": seconds, "loaded": loaded, "peak": peak, "losses": losses}

    sides = {
        "ours": side([1, 2, 4], 1000, 2000, [3.0, 2.0]),
        "peft-padded": side([3, 4, 4], 1000, 6000, [3.0, 2.02]),
        "peft-packed": side([2, 8, 8], 1000, 5000, [3.0, 2.0]),
        "peft-single": side([2, 3, 6], 1000, 3000, [3.03, 2.0]),
        "peft-single-16bit-reply": side([1, 2, 4], 1000, 2500, [3.0, 2.0]),
    }
    results = {"sides": sides, "tokens": [100, 100, 200], "rows": [60, 70, 80]}
    config = Config(rounds=3)
    report = bench_train._report(config, results | {"machine": "a box", "load": 0.5})
    assert "| peft-padded | 33 | 2.00 x | 0.00 | 0.20 x | 0.00 | 0.33 x | 2.0200 |" in report
    assert "theirs padded, peft-padded: 2.00 x the tokens/s, 0.20 x the memory" in report
    assert "theirs unpadded, peft-single: 1.50 x the tokens/s, 0.50 x the memory" in report
    assert "theirs unpadded, reply only, peft-single-16bit-reply: 1.00 x the tokens/s" in report
    assert "differ from ours by at most 1.00 %." in report
