"""What the tests of several rooms share: tiny judges with and without adapters, and pairs of the
demo writers."""

import json
import math
import re
from collections.abc import Callable, Sequence
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import SIZES
from tiny_bases import CPU, make_folder, random_lora
from torch import Tensor

from nanopersrm.judge.adapter_settings import AdapterSettings
from nanopersrm.judge.judge import Judge
from nanopersrm.judge.judgement import JudgeConfig, Judgement
from nanopersrm.model.base import Base, resolve
from nanopersrm.model.cache import Layout
from nanopersrm.model.lora import Lora, save_lora
from nanopersrm.model.tokenizer import Tokenizer
from nanopersrm.model.transformer import Model
from nanopersrm.model.weights import load
from nanopersrm.pairs import Pair
from nanopersrm.style.evidence import NGRAMS, READING, Evidence
from nanopersrm.style.ledger import SUM
from nanopersrm.style.phrases import Word, words_of
from nanopersrm.style.reading import Reading, ReadingConfig, TextReading

EXEMPLARS = ["I came home late. No supper; no letters, either.", "So be it! We shall see."]
CANDIDATES = [
    "We arrived late, and there was no supper.",
    "lol no food 😭 again!!",
    "Furthermore, the supper had not been prepared; one was obliged to wait.",
    "I came home. Nothing.",
    "Was there supper? There was not.",
    "The supper (cold) stood there… untouched.",
    "It is what it is.",
    "Supper: none. Letters: none.",
    "They were, perhaps, somewhat late.",
]
PLAIN = JudgeConfig(think=False)
QUICK = JudgeConfig(think_lines=2)
WEIGHED = Evidence(
    {READING: 40.0, NGRAMS: 50.0, "semicolons": 6.0, "commas": 4.0, "questions": 3.0, "variety": 2},
    {READING: 0.1, NGRAMS: 0.2, "semicolons": 0.3, "commas": 0.1, "questions": 0.1, "variety": 0},
    1.0,
    2.0,
)
KINDS = {  # the layout of the vocabulary, with a model family
    "smollm": "LlamaConfig",
    "qwen2": "Qwen3Config",  # <think> and </think> are tokens of their own
    "llama-bpe": "Qwen2Config",
    "gpt-2": "LlamaConfig",  # no chat template
}


def make_base(folder: Path, pre: str, context: int = 4096) -> Base:
    """A random model with a small tokenizer, as a Hugging Face folder."""
    import transformers  # takes seconds

    make_folder(folder, pre)
    V = Tokenizer.load(Base("tiny", folder, "safetensors", {})).vocab_size
    sizes = SIZES | {"vocab_size": V, "num_hidden_layers": 2, "max_position_embeddings": context}
    torch.manual_seed(11)
    oracle = transformers.AutoModelForCausalLM.from_config(
        getattr(transformers, KINDS[pre])(**sizes)
    ).eval()
    with torch.no_grad():
        for parameter in oracle.parameters():
            parameter.normal_(0, 0.2 if parameter.ndim > 1 else 1.0)
    oracle.save_pretrained(folder)
    return resolve(str(folder))


def digits_after(model: Model, tokenizer: Tokenizer, ids: list[int]) -> Tensor:
    """(9,) fp64 probabilities of the digits after a text, from one plain forward."""
    with torch.inference_mode():
        hidden = model(torch.tensor(ids), Layout.of([len(ids)]))
        logits = model.logits(hidden[-1:])[0]
    return logits[list(tokenizer.digit_ids)].double().softmax(-1)


def fond_of_quotes(model: Model, tokenizer: Tokenizer, patch: pytest.MonkeyPatch) -> None:
    """Every token becomes about as likely, and a quote mark twenty times as likely."""
    patch.setattr(tokenizer, "eos_ids", tokenizer.eos_ids & tokenizer.special_ids)
    logits, mark = model.logits, tokenizer.encode('"')

    def fond(hidden: Tensor) -> Tensor:
        flat = logits(hidden) / 8
        flat[:, mark] += 3
        return flat

    patch.setattr(model, "logits", fond)


def moved(model: Model, seed: int) -> Lora:
    """An adapter that has learned something."""
    return random_lora(model, seed=seed, size=0.2)


def instrument(gain: Callable[[str], float], back: float = 0.1) -> Any:
    """What reads a word as a token, and gives it a gain that depends on it alone."""

    def read(_: Sequence[str], texts: Sequence[str]) -> list[TextReading]:
        spans = [[match.span() for match in re.finditer(r"\S+", text)] for text in texts]
        gains = [[gain(word) for word in text.split()] for text in texts]
        return [
            TextReading(math.fsum(some) / len(some), back, some, places)
            for some, places in zip(gains, spans, strict=True)
        ]

    def words(_: Sequence[str], texts: Any, readings: Any, topics: bool = True) -> list[list[Word]]:
        return [words_of(t, r.spans, r.gains) for t, r in zip(texts, readings, strict=True)]

    return SimpleNamespace(read=read, words=words)


def make_adapter(folder: Path, base: Base, **changed: object) -> Path:
    """What train_sft.py leaves behind: two random adapters for `base`, and judge.json."""
    model = load(base, torch.float32, CPU)
    save_lora(folder, moved(model, 1), base.name)
    config, tokenizer = ReadingConfig(40, 30, 20), Tokenizer.load(base)
    Reading(model, tokenizer, config, moved(model, 2)).save(folder / "reading", base.name)
    WEIGHED.save(folder)
    facts: dict[str, Any] = {"base": base.name, "base_sha256": None, "nf4": False, "dtype": "fp32"}
    facts |= {"form": "both", **changed}
    AdapterSettings(**facts).save(folder)
    return folder


def fresh(base: Base) -> Judge:
    """The base alone in fp32, and known evidence."""
    return Judge(load(base, torch.float32, CPU), Tokenizer.load(base), evidence=WEIGHED)


def sane(judgement: Judgement, n: int) -> None:
    """Every number is where it can be, and what is shown adds up."""
    assert len(judgement.scores) == len(judgement.preference) == n
    assert all(score is not None and 1 <= score <= 9 for score in judgement.scores)
    for i, j in combinations_with_replacement(range(n), 2):
        assert judgement.preference[i][j] + judgement.preference[j][i] == pytest.approx(1)
    assert sorted(judgement.ranking) == list(range(n))
    assert judgement.verdict in ("tie", judgement.ranking[0])
    for ledger in (candidate.ledger for candidate in judgement.candidates if candidate.ledger):
        assert ledger[-1].feature == SUM
        shown = math.fsum(line.decibans for line in ledger[:-1])
        assert ledger[-1].decibans == pytest.approx(shown, abs=1e-9)
    json.dumps(judgement.as_dict(), allow_nan=False)


def plain(judgement: Judgement) -> dict[str, Any]:
    """Everything but the clock."""
    return {key: value for key, value in judgement.as_dict().items() if key != "seconds"}


def mirrored(one: Judgement, two: Judgement, order: tuple[int, ...]) -> None:
    """`two` judged the candidates of `one` in `order`: equal to the last bit."""
    assert two.scores == [one.scores[i] for i in order]
    assert two.preference == [[one.preference[i][j] for j in order] for i in order]
    assert (two.tokens, two.prompt_tokens) == (one.tokens, one.prompt_tokens)
    if isinstance(one.verdict, int) and isinstance(two.verdict, int):
        assert order[two.verdict] == one.verdict
        assert [order[i] for i in two.ranking] == one.ranking
    else:
        assert two.verdict == one.verdict
    assert two.candidates == [one.candidates[i] for i in order]
    replies = {
        tuple(order.index(i) for i in reply.candidates): (reply.features, reply.reasoning)
        for reply in one.replies
    }
    assert {reply.candidates: (reply.features, reply.reasoning) for reply in two.replies} == replies


DEMO = Path(__file__).parents[1] / "data" / "demo"


def pairs_of(writers: list[str], count: int = 2) -> list[Pair]:
    """Every two writers, text 4 as candidates, the first `count` as exemplars; twins."""
    texts = {
        w: [(DEMO / w / f"{i}.txt").read_text(encoding="utf-8") for i in range(1, 7)]
        for w in writers
    }
    return [
        Pair(
            id=f"{one}-{two}-{side}",
            twin=f"{one}-{two}-{other_side}",
            author=author,
            domain="demo",
            split="test",
            kind="cross_author",
            exemplars=tuple(texts[author][:count]),
            question="",
            chosen=texts[author][3],
            rejected=texts[other][3],
            chosen_from=f"{author}/4",
            rejected_from=f"{other}/4",
        )
        for one, two in combinations(writers, 2)
        for side, other_side, author, other in (("a", "b", one, two), ("b", "a", two, one))
    ]


PAIRS = pairs_of(["edmund", "zoe", "grubb", "iris", "nell"])
TRAIN = pairs_of(["cole", "dolores", "imre", "otto", "ray", "tessa"])
