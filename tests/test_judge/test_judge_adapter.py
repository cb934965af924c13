"""Judging with a trained adapter: it is the merged model, and what it says is measured."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist
from unittest.mock import Mock

import pytest
import torch
from fixtures import (
    CANDIDATES,
    CPU,
    EXEMPLARS,
    PAIRS,
    PLAIN,
    QUICK,
    WEIGHED,
    make_adapter,
    moved,
    sane,
)
from safetensors.torch import load_file, save_file
from tiny_bases import logits
from tiny_bases import refused as call_refused
from torch import Tensor

from data.build import demo_pairs
from nanopersrm.judge import adapter_settings
from nanopersrm.judge.judge import UNTRAINED, Judge
from nanopersrm.judge.judgement import JudgeConfig, JudgedCandidate
from nanopersrm.judge.tell import sentence
from nanopersrm.model.base import DEFAULT_BASE
from nanopersrm.model.linear import Linear
from nanopersrm.model.lora import load_lora
from nanopersrm.model.sampler import PrefixCache
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.weights import load
from nanopersrm.style.evidence import FACTOR_NAMES, FEATURES, NGRAMS, READING, Evidence
from nanopersrm.style.features import measure
from nanopersrm.style.ledger import SUM, Line
from nanopersrm.style.profile import reference
from nanopersrm.style.reading import Reading, ReadingConfig
from nanopersrm.style.text import FOLD

WEIGHTS = dict.fromkeys(FACTOR_NAMES, 3.0) | {NGRAMS: 60.0, READING: 40.0}
EVERY = Evidence(WEIGHTS, dict.fromkeys(FEATURES, 0.1), 1.0, 0.0)


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory) -> Path:
    return make_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(scope="module")
def judge(base, folder) -> Judge:
    return Judge.load(base.path, folder, dtype="fp32")


def test_the_adapter_is_the_merged_model(base, folder, judge):
    model = load(base, torch.float32, CPU)
    other = Judge(model, Tokenizer.load(base))
    other.measurer = judge.measurer  # so that the prompts are the same
    untrained = other.judge(EXEMPLARS, CANDIDATES[:3], config=PLAIN)
    lora = load_lora(folder, model)
    with torch.no_grad():
        for name, (A, B) in lora.masters.items():
            model.get_parameter(f"{name}.weight").add_(lora.config.scale * B @ A)
    other._prefixes = PrefixCache(model)
    merged = other.judge(EXEMPLARS, CANDIDATES[:3], config=PLAIN)
    found = judge.judge(EXEMPLARS, CANDIDATES[:3], config=PLAIN)
    assert found.scores == pytest.approx(merged.scores, abs=1e-3)
    gaps = [abs(a - b) for a, b in zip(found.scores, untrained.scores, strict=True)]
    assert min(gaps) > 0.05


# What it says is measured: each number and each quote once more, by another path


@pytest.fixture(scope="module")
def honest(base, folder) -> Judge:
    """A judge that shows every feature, and reads whole texts."""
    model, tokenizer = load(base, torch.float32, CPU), Tokenizer.load(base)
    load_lora(folder, model).freeze().on(model)
    reading = Reading(model, tokenizer, ReadingConfig(4000, 4000, 2000), moved(model, 5))
    return Judge(model, tokenizer, True, reading, evidence=EVERY)


def likeness_of_habit(name: str, writer: float, text: float) -> float:
    """How much denser texts stand there around r z of the writer than around anybody."""
    stats = reference().factors[name]
    a, b = (
        max(-4.0, min(4.0, (math.sqrt(value) - stats.root_mean) / stats.root_sd))
        for value in (writer, text)
    )
    r = min(0.95, stats.reliability)
    ratio = NormalDist(r * a, math.sqrt(1 - r * r)).pdf(b) / NormalDist().pdf(b)
    return math.log(ratio)


def vectors(texts: Sequence[str], words: int) -> list[dict[str, float]]:
    """Of each piece of about so many words: (1 + log count) x idf of its 3- and 4-grams."""
    found, idf = [], reference().idf
    for text in texts:
        tokens = text.split()
        n = max(1, round(len(tokens) / words))
        for k in range(n):
            piece = " ".join(tokens[k * len(tokens) // n : (k + 1) * len(tokens) // n])
            piece = piece.translate(FOLD).lower().replace("—", " - ").replace("–", " - ")
            counts = Counter(
                f" {token} "[i : i + size]
                for token in piece.split()
                for size in (3, 4)
                for i in range(len(token) + 3 - size)
            )
            found.append(
                {g: (1 + math.log(c)) * idf.get(g, reference().rare) for g, c in counts.items()}
            )
    return found


def cosine(exemplars: Sequence[str], text: str) -> float:
    """Mean over all pairs of pieces."""
    pairs = [(a, b) for a in vectors(exemplars, 150) for b in vectors([text], 100)]
    return math.fsum(
        math.fsum(a[g] * b[g] for g in a.keys() & b.keys())
        / math.hypot(*a.values())
        / math.hypot(*b.values())
        for a, b in pairs
    ) / len(pairs)


class PlainReading:
    """Both directions by whole forwards: no cache, no prefix, nothing side by side."""

    def __init__(self, judge: Judge, exemplars: Sequence[str], text: str):
        reading, encode = judge.measurer.reading, judge.tokenizer.encode
        assert reading is not None
        assert reading.lora is not None
        blank = encode("\n\n")
        writer = [i for exemplar in exemplars for i in (*encode(exemplar.strip()), *blank)]
        ids, spans = judge.tokenizer.encode_with_spans(text)

        def log_p(before: list[int], ids: list[int]) -> Tensor:
            rows = logits(judge.model, before + ids)[len(before) - 1 : -1].log_softmax(-1)
            return rows.gather(1, torch.tensor(ids)[:, None])[:, 0]

        with reading.lora.using(judge.model):
            gains = log_p(writer, ids) - log_p(blank, ids)
            writer = writer[: -len(blank)]
            back = log_p([*ids, *blank], writer) - log_p(blank, writer)
        gains[0] = back[0] = 0
        self.text, self.gains, self.spans = text, gains.tolist(), spans
        self.forward, self.back = float(gains.mean()), float(back.mean())

    def gain(self, start: int, end: int) -> float:
        """Of the tokens that end in these words; of blanks alone, those before one of them."""
        total = 0.0
        for (a, b), gain in zip(self.spans, self.gains, strict=True):
            token, rest = self.text[a:b], self.text[b:]
            place = a + len(token.rstrip())
            if not token.strip():  # of the next word, but for a line break
                place = -1 if "\n" in token else b + len(rest) - len(rest.lstrip()) + 1
            total += gain * (start < place <= end)
        return total


def check_line(
    line: Line, exemplars: Sequence[str], text: str, known: JudgedCandidate, plain: PlainReading
):
    """text: the candidate as it came, white space around it too."""
    if line.feature == READING:
        assert known.reading is not None
        forward, back = known.reading.forward, known.reading.back
        assert (forward, back) == pytest.approx((plain.forward, plain.back), abs=2e-4)
        assert (line.writer, line.candidate) == (None, round((forward + back) / 2, 4))
        likeness, blanks = (forward + back) / 2, len(text) - len(text.lstrip())
        for words in line.words:
            worth = (
                40.0 * plain.gain(words.start - blanks, words.end - blanks) / 2 / len(plain.gains)
            )
            assert words.decibans == pytest.approx(worth, abs=0.051)
    elif line.feature == NGRAMS:
        likeness = cosine(exemplars, text)
        assert (line.writer, line.candidate) == (None, round(100 * likeness, 2))
    else:
        writer, value = (measure(texts)[line.feature] for texts in (exemplars, [text]))
        assert writer is not None
        assert value is not None
        assert (line.writer, line.candidate) == (round(writer, 4), round(value, 4))
        likeness = likeness_of_habit(line.feature, writer, value)
        assert all(measure([f"{words.text} x"])[line.feature] for words in line.words)
    assert line.decibans == round(WEIGHTS[line.feature] * (likeness - 0.1), 1)
    assert all(text[words.start : words.end] == words.text for words in line.words)


def test_every_line_is_measured_again(honest):
    exemplars = [f" {text}" for text in PAIRS[0].exemplars]
    texts = [f"\n\n \t{PAIRS[0].chosen}", PAIRS[0].rejected, "  lol - no; food 😭, again!!"]
    plain = [PlainReading(honest, exemplars, text.strip()) for text in texts]
    seen, quotes = Counter[str](), 0
    for config in (
        JudgeConfig(all_evidence=True),
        JudgeConfig("pairwise", all_evidence=True),
        JudgeConfig(think_lines=6, samples=2),
        JudgeConfig("pairwise", think_lines=3, temperature=3.0),
    ):
        judgement = honest.judge(exemplars, texts, config=config)
        sane(judgement, 3)
        for text, known, read in zip(texts, judgement.candidates, plain, strict=True):
            *lines, total = known.ledger
            for line in lines:
                check_line(line, exemplars, text, known, read)
                quotes += len(line.words)
            seen.update(line.feature for line in lines)
            assert total == Line(SUM, None, None, round(sum(x.decibans for x in lines), 1) + 0.0)
            if config.all_evidence and config.mode == "pointwise":  # nothing is left out
                assert known.decibans == total.decibans
                assert known.measured == round(EVERY.probability(total.decibans), 1)
                reasoning = judgement.reasoning[texts.index(text)]
                assert reasoning == " ".join(map(sentence, known.ledger))
    assert {READING, NGRAMS, "semicolons", "emoji", "variety"} <= {*seen}
    assert seen.total() > 250
    assert quotes > 100


def test_what_was_read_stands_beside_the_score(judge, monkeypatch):
    """Of each candidate as it came, blanks around it or not; nothing is read twice."""
    reading = judge.measurer.reading
    read = reading.read
    monkeypatch.setattr(reading, "read", watched := Mock(side_effect=read))
    texts = [CANDIDATES[2], CANDIDATES[0], f"\r\n  {CANDIDATES[2]} \n"]
    judgement = judge.judge(EXEMPLARS, texts, config=JudgeConfig("pairwise", think=False))
    watched.assert_called_once_with(EXEMPLARS, sorted([CANDIDATES[0], CANDIDATES[2]]))
    for text, known in zip(texts, judgement.candidates, strict=True):
        found, (expected,) = known.reading, read(EXEMPLARS, [text])
        assert known.ledger == []
        assert (found.forward, found.back) == pytest.approx(
            (expected.forward, expected.back), abs=1e-4
        )
        spans = [(word.start, word.end) for word in found.words]
        assert [text[a:b] for a, b in spans] == text.split()[: len(spans)]
        assert all(text[x.start : x.end] == x.text for x in found.phrases)
        score = (found.forward + found.back) / 2
        assert known.decibans == WEIGHED.total(EXEMPLARS, text.strip(), score)


def test_what_is_no_number_is_not_shown(base, folder):
    judge = Judge.load(base.path, folder, dtype="fp32")
    judge.model.norm.weight.fill_(math.nan)
    judgement = judge.judge(EXEMPLARS, CANDIDATES[:2], config=JudgeConfig(all_evidence=True))
    assert (judgement.verdict, judgement.candidates[0].reading) == ("invalid", None)
    assert READING not in {line.feature for line in judgement.candidates[0].ledger}
    json.dumps(judgement.as_dict(), allow_nan=False)


# Training and 4 bits


def test_a_model_in_training_can_judge(base, folder, judge):
    """Unpacked, with adapters that still learn, and judged the same."""
    model = load(base, torch.float32, CPU)
    policy = load_lora(folder, model)
    tokenizer = Tokenizer.load(base)
    reading = Reading.load(folder / "reading", model, tokenizer)
    policy.on(model)
    live = Judge(model, tokenizer, trained=True, reading=reading, evidence=WEIGHED)
    expected = judge.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    found = live.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    assert found.scores == pytest.approx(expected.scores, abs=1e-4)
    assert found.notes == []
    assert all(part.requires_grad and part.grad is None for part in policy.parameters())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_judge_trained_in_4_bits_judges_in_4_bits(base, judge, tmp_path, dtype):
    folder = make_adapter(tmp_path / "four", base, nf4=True)
    four_bits = Judge.load(base.path, folder, dtype=dtype)
    matrix = four_bits.model.get_submodule("layers.0.mlp.up_proj")
    assert isinstance(matrix, Linear)
    assert (matrix.nf4 is None) == matrix.weight.is_mkldnn  # unpacked where bf16 is packed
    judgement = four_bits.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK)
    sane(judgement, 2)
    assert judgement.scores != judge.judge(EXEMPLARS, CANDIDATES[:2], config=QUICK).scores


# Notes and errors


def test_notes(base, folder, judge, tmp_path):
    assert judge.judge(EXEMPLARS, CANDIDATES[:1], config=QUICK).notes == []
    (prose,) = judge.judge(
        EXEMPLARS, CANDIDATES[:1], config=JudgeConfig(free=True, think_tokens=2)
    ).notes
    assert "trained to reason in lines" in prose
    bare = make_adapter(tmp_path / "bare", base, form="pointwise", free=True)
    other = Judge.load(base.path, bare, dtype="fp32")
    config = JudgeConfig("pairwise", think=False)
    assert len(other.judge(EXEMPLARS, CANDIDATES[:2], config=config).notes) == 2
    (bare / "judge.json").unlink()
    peft = Judge.load(base.path, bare, dtype="fp32")
    assert peft.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes == []
    untrained = Judge.load(base.path, dtype="fp32")
    assert untrained.judge(EXEMPLARS, CANDIDATES[:1], config=PLAIN).notes == [UNTRAINED]


def test_refused_folders(base, tmp_path):
    def refused(folder: Path, part: str) -> None:
        call_refused(lambda: Judge.load(base.path, folder, dtype="fp32"), str(folder), part)

    refused(tmp_path / "nowhere", "--adapter")
    refused(tmp_path, "adapter_config.json")
    folder = make_adapter(tmp_path / "adapter", base)
    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(iter(tensors))
    save_file(tensors | {name: tensors[name][:, :-1].clone()}, folder / "adapter_model.safetensors")
    refused(folder, f"tensor {name} has shape")
    folder = make_adapter(tmp_path / "fresh", base)
    (folder / "evidence.json").write_text('{"weights": 1}')
    refused(folder, "evidence.json")
    (folder / "judge.json").write_text("{")
    refused(folder, "line 1")


# The adapter in the package


def test_what_the_package_brings():
    made = adapter_settings.read(adapter_settings.SHIPPED)
    assert made is not None
    evidence = Evidence.load(adapter_settings.SHIPPED)
    assert (made.base, made.nf4, made.free, len(evidence.folds)) == (DEFAULT_BASE, False, False, 5)
    assert min(evidence.weights.values()) == 0 < evidence.weights[READING]
    assert (evidence.loss or 1.0) < 0.5
    files = [path for path in adapter_settings.SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 24 << 20


@pytest.mark.slow
@pytest.mark.base
def test_it_knows_writers_it_was_not_trained_on():
    """Twelve invented writers, none of them in its training pairs: 20 couples of twins."""
    judge = Judge.load()
    assert judge.trained
    assert judge.measurer.reading is not None
    pairs = demo_pairs(seed=3, pairs=40)[:40]
    right = {}
    for pair in pairs:
        judgement = judge.judge(pair.exemplars, [pair.chosen, pair.rejected])
        sane(judgement, 2)
        assert judgement.notes == []
        right[pair.id] = judgement.verdict == 0
    assert sum(right.values()) >= 30
    assert sum(right[pair.id] and right[pair.twin] for pair in pairs) >= 22
