"""The scalar reward: one number at the row where the judge reads its digit."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import tyro
from fixtures import PAIRS, make_adapter, make_base, moved
from safetensors.torch import save_file
from test_train_sft import curve, short_pairs

from nanopersrm import InputError
from nanopersrm.evaluate import evaluate
from nanopersrm.judge import verdict
from nanopersrm.judge.prompts import messages
from nanopersrm.model.base import Base
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import LoraConfig
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import write
from nanopersrm.rivals import scalar, train_scalar
from nanopersrm.rivals.scalar import Scalar
from nanopersrm.style.profile import StyleEvidence
from nanopersrm.style.similarity import StyleEvidenceFn
from nanopersrm.train import course, packing
from nanopersrm.train.lessons import LessonConfig

CPU = torch.device("cpu")
EXEMPLARS = ["Rain; then rain again, and the gutters full.", "I wrote to her; no answer came."]
CANDIDATES = ["Wow!!! So good!!!", "It rained; I stayed in, and wrote.", "Fine."]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Base:
    return make_base(tmp_path_factory.mktemp("scalar") / "smollm", "smollm", 16_384)


@pytest.fixture(scope="module")
def made(base) -> tuple[Model, Tokenizer, Scalar]:
    """An adapter that has learned something, and a head."""
    model = load(base, torch.float32, CPU)
    head = torch.randn(model.config.D, generator=torch.Generator().manual_seed(3))
    return model, Tokenizer.load(base), Scalar(moved(model, 1), head)


def asked(
    made: tuple[Model, Tokenizer, Scalar],
    candidates: list[str],
    question: str = "",
    evidence: bool = False,
    near: StyleEvidenceFn | None = None,
) -> list[float]:
    """The scores of some candidates, none of them missing."""
    found = scalar.scorer(*made, evidence, near)(EXEMPLARS, question, candidates)
    assert found is not None
    return list(found)


def by_hand(made: tuple[Model, Tokenizer, Scalar], text: str) -> float:
    """One prompt, one plain forward, one product."""
    model, tokenizer, learned = made
    chat = messages(EXEMPLARS, [text], "Why?")
    forced = tokenizer.encode(verdict.closing("")[1])
    ids = tokenizer.chat(chat, continuation=verdict.OPEN) + forced
    with torch.no_grad(), learned.lora.using(model):
        hidden = model(torch.tensor(ids), Layout.of([len(ids)]))
    return float((hidden[-1].double() * learned.head.detach().double()).sum())


def test_a_score_is_a_product_with_the_state_before_the_digit(made):
    found = asked(made, CANDIDATES, "Why?")
    assert found == pytest.approx([by_hand(made, text) for text in CANDIDATES], abs=2e-4)
    assert len(set(found)) == 3
    assert asked(made, CANDIDATES[::-1], "Why?") == pytest.approx(found[::-1], abs=2e-4)
    assert all(matrix.adapter is None for matrix in made[2].lora.places.values())  # off again


def test_evidence_and_style_change_what_is_asked(made):
    plain = asked(made, CANDIDATES)
    shown = asked(made, CANDIDATES, evidence=True)

    def told(exemplars, texts):
        return [StyleEvidence(97.0), StyleEvidence(3.0), StyleEvidence(50.0, 50.0)]

    near = asked(made, CANDIDATES, evidence=True, near=told)
    assert len({*plain, *shown, *near}) == 9


def test_what_does_not_fit_the_context_has_no_score(made):
    model, tokenizer, learned = made
    score = scalar.scorer(model, tokenizer, learned, False, None)
    assert score(EXEMPLARS, "", ["Short.", "word " * model.config.context]) is None


def test_it_is_the_same_from_its_folder(made, base, tmp_path):
    model, tokenizer, learned = made
    folder = make_adapter(tmp_path / "scalar", base)
    scalar.save_head(folder, learned)
    again = scalar.load(folder, model)  # make_adapter's judge adapter is moved(model, 1) too
    assert torch.equal(again.head, learned.head)
    first, second = (asked((model, tokenizer, one), CANDIDATES) for one in (learned, again))
    # The same numbers, but memory that begins elsewhere is summed in other portions on some CPUs.
    assert first == pytest.approx(second, abs=2e-6)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({}, "found none"),
        ({"head": torch.zeros(5)}, r"found \(5,\)"),
        ({"head": torch.full((48,), float("nan"))}, "finite"),
        (None, "cannot be read"),
    ],
)
def test_a_broken_head_is_named(made, tensors, said, tmp_path):
    if tensors is None:
        (tmp_path / scalar.FILE).write_bytes(b"nonsense")
    else:
        save_file(tensors, tmp_path / scalar.FILE)
    with pytest.raises(InputError, match=f"head.safetensors.*{said}"):
        scalar.load(tmp_path, made[0])


def test_training_raises_the_chosen_text_above_its_rivals(made, base):
    """The gradient of the loss reaches head and adapter; a small step along it lowers the loss."""
    model, tokenizer, _ = made
    learned = Scalar.new(model, LoraConfig(rank=4), seed=5)
    pair = short_pairs()[0]
    tree = course.tree(
        pair, {}, tokenizer, LessonConfig(longest=10_000, rivals=1), "0", None, replies=False
    )
    assert tree is not None
    assert not any(branch.reply_from < len(branch.ids) for branch in tree.branches)
    batch = packing.batch([tree], CPU)

    def loss() -> torch.Tensor:
        learned.refresh()
        learned.on(model)
        s = learned.scores(model(batch.ids, batch.layout), batch)
        (_, _, chosen) = batch.lists[0]
        return -torch.nn.functional.logsigmoid(s[chosen] - s[1 - chosen])

    before = loss()
    before.backward()
    parts = learned.parameters()
    assert parts[-1] is learned.head
    gradients = [part.grad for part in parts if part.grad is not None]
    assert len(gradients) == len(parts)
    assert all(bool(gradient.any()) for gradient in gradients[1::2])  # of each B
    assert bool(gradients[-1].any())
    with torch.no_grad():
        for part, gradient in zip(parts, gradients, strict=True):
            part.sub_(1e-3 * gradient / gradient.norm().clamp_min(1e-9))
    assert loss().item() < before.item()
    learned.lora.off(model)


# The commands


@pytest.fixture(scope="module")
def given(base, tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("train_scalar")
    write(folder / "pairs.jsonl", short_pairs())
    return [
        *("--preset", "tiny", "--base", str(base.path), "--pairs", str(folder / "pairs.jsonl")),
        *("--save-every", "1", "--eval-pairs", "2", "--lesson.longest", "10000"),
        *("--lora.rank", "4", "--bundles", "2", "--steps", "4"),
    ]


def train(*arguments: object) -> int:
    return train_scalar.run(tyro.cli(train_scalar.Config, args=[str(a) for a in arguments]))


def test_a_run_goes_on_where_it_was_and_can_be_evaluated(given, base, tmp_path, capsys):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert train(*given, "--out", whole) == 0
    said = capsys.readouterr()
    assert "before: " in said.out + said.err
    assert "after: " in said.out
    assert train(*given, "--out", cut, "--keep-last", "9") == 0
    for step in (3, 4):  # as if it had been killed in the third
        shutil.rmtree(cut / "checkpoints" / f"step-{step:06d}")
    assert train(*given, "--out", cut, "--keep-last", "9", "--resume") == 0
    assert curve(cut) == curve(whole)
    both = [(run / "adapter" / scalar.FILE).read_bytes() for run in (whole, cut)]
    assert both[0] == both[1]
    numbers = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
    assert [line["step"] for line in numbers] == [1, 2, 3, 4]

    write(tmp_path / "test.jsonl", [replace(p, split="test") for p in PAIRS[:2]])
    out = tmp_path / "result.json"
    sft = make_adapter(tmp_path / "sft", base)
    said = json.loads((sft / "judge.json").read_text()) | {"base": "elsewhere"}
    (sft / "judge.json").write_text(json.dumps(said))
    arguments = ["--pairs", tmp_path / "test.jsonl", "--base", base.path, "--dtype", "fp32"]
    arguments += ["--beside", f"scalar={whole / 'adapter'}", f"sft={sft}", "--out", out]
    code = evaluate.run(tyro.cli(evaluate.Config, args=[*map(str, arguments), "--no-neutral"]))
    assert code == 0, capsys.readouterr()
    result = json.loads(out.read_text())
    assert list(result["judges"]) == ["model", "scalar", "sft"]
    assert result["judges"]["scalar"]["invalid_rate"]["value"] == 0
    assert "a scalar reward" in result["facts"]["judges"]["scalar"]
    assert "this adapter was trained on elsewhere" in result["facts"]["judges"]["sft"]
    assert "elsewhere" not in result["facts"]["judges"]["scalar"]
    lines = out.with_suffix(".opinions.jsonl").read_text().splitlines()
    scores = {line["judge"]: line["scores"] for line in map(json.loads, lines)}
    assert len({tuple(some) for some in scores.values()}) == 3


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("scalar", "expected NAME=FOLDER"),
        ("=runs", "expected NAME=FOLDER"),
        ("ngrams=runs", "is the name of another judge"),
        ("a=nowhere", "nowhere"),
    ],
)
def test_beside_is_checked(given, said, base, tmp_path, capsys):
    write(tmp_path / "test.jsonl", PAIRS[:2])
    arguments = ["--pairs", tmp_path / "test.jsonl", "--base", base.path, "--beside", given]
    code = evaluate.run(tyro.cli(evaluate.Config, args=[str(a) for a in arguments]))
    told = capsys.readouterr().err
    assert (code, told.count("\n")) == (2, 1), told
    assert said in told
