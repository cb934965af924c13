"""Reading: log-probabilities of whole texts however they are computed, the gain, and its file."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fixtures import CANDIDATES, EXEMPLARS, fresh, moved
from tiny_bases import refused
from torch import Tensor

from nanopersrm import InputError
from nanopersrm.judge.judge import Judge
from nanopersrm.model.cache import Layout
from nanopersrm.model.linear import matrices
from nanopersrm.model.lora import adapter_off
from nanopersrm.style import reading as module
from nanopersrm.style.reading import Reading, ReadingConfig, TextReading, context_ids

CONFIG = ReadingConfig(exemplar_tokens=60, back_tokens=30, candidate_tokens=24)
TEXTS = ["So.", *CANDIDATES[:4]]  # the last ones are cut
OTHERS = [[text] for text in CANDIDATES[3:]]  # more writers than are kept


@pytest.fixture(scope="module")
def judge(base) -> Judge:
    """A model and its tokenizer."""
    return fresh(base)


def reader(judge: Judge, adapter: bool = True) -> Reading:
    lora = moved(judge.model, 2) if adapter else None
    return Reading(judge.model, judge.tokenizer, CONFIG, lora)


@pytest.fixture(params=[False, True], ids=["base alone", "adapter"])
def reading(request, judge) -> Reading:
    return reader(judge, request.param)


def plain(reading: Reading, exemplars: Sequence[str] | list[int], ids: list[int]) -> Tensor:
    """log p of each id (T,) from one forward of the whole text, nothing kept; after exemplars, or
    after these ids."""
    model, most = reading.model, reading.config.exemplar_tokens
    texts = [text for text in exemplars if isinstance(text, str)]
    flat = [*(context_ids(reading.tokenizer, texts, most) if texts else exemplars), *ids]
    on = reading.lora.using(model) if reading.lora else adapter_off(model)
    with torch.no_grad(), on:
        hidden = model(torch.tensor(flat), Layout.of([len(flat)]))
        log_p = model.logits(hidden).log_softmax(-1)  # (all, V)
    return log_p[-len(ids) - 1 : -1].gather(1, torch.tensor(ids)[:, None])[:, 0]


@pytest.mark.parametrize("rows", [module.ROWS_AT_ONCE, 1])
def test_log_probs_are_those_of_whole_texts(reading, monkeypatch, rows):
    """All candidates in one forward or each in its own; exemplars cut, whole, too short to keep."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows)
    ids = [reading.candidate(text)[0] for text in TEXTS]
    assert len({*map(len, ids)}) > 2
    for exemplars in ([*EXEMPLARS, "word " * 90], EXEMPLARS, ["So."], [""]):
        for found, text in zip(reading.log_probs(exemplars, ids), ids, strict=True):
            torch.testing.assert_close(found, plain(reading, exemplars, text), rtol=0, atol=1e-4)
    for contexts in ([[*ids[2], *reading.blank], ids[1]], [reading.blank]):
        rows = reading.under(reading.roots(contexts), ids)
        for before, row in zip(contexts, rows, strict=True):
            for found, text in zip(row, ids, strict=True):
                torch.testing.assert_close(found, plain(reading, before, text), rtol=0, atol=1e-4)


def test_exemplars_share_the_room():
    """Of 14 tokens the one of 2 takes what it needs, and the others 6 each."""

    class Letters:
        def encode(self, text: str) -> list[int]:
            return [0] if text == module.BLANK else [*map(ord, text)]

    letters: Any = Letters()
    texts = ["b" * 10 + "B", " aa\n", "c" * 20 + "C"]
    found = "".join(map(chr, context_ids(letters, texts, 17)))
    assert found == "bbbbbb\0aa\0cccccc\0"
    assert len(context_ids(letters, texts, 99)) == 37
    assert context_ids(letters, ["ab", "cd"], 1) == [ord("a"), 0, ord("c"), 0]


def test_what_is_read_of_a_candidate(reading):
    """Its first tokens, and their places in the text as it came."""
    text = " \n Für 👩‍👩‍👧 gibt's Tee: naïve, süß… und so fort, bis alles gesagt ist.\n"
    ids, spans = reading.candidate(text)
    whole, _ = reading.tokenizer.encode_with_spans(text.strip())
    assert ids == whole[:24] != whole
    assert sorted({i for span in spans for i in range(*span)}) == [*range(3, spans[-1][1])]
    (result,) = reading.read(EXEMPLARS, [text])
    assert (len(result.gains), result.spans) == (24, spans)
    for blank in ("", " \n\t"):
        with pytest.raises(InputError, match="blank"):
            reading.read(EXEMPLARS, [CANDIDATES[0], blank])


def test_the_worked_number(reading, monkeypatch):
    """The first token counts for nothing."""
    texts = {"c": [-3.4] * 4, "e": [-3.35] * 4}
    after = {"c": [-9.0, -3.0, -3.0, -3.0], "e": [-9.0, -3.25, -3.25, -3.15]}
    monkeypatch.setattr(reading, "log_probs", lambda *_: [torch.tensor(after["c"])])
    monkeypatch.setattr(reading, "under", lambda *_: [[torch.tensor(after["e"])]])
    monkeypatch.setattr(reading, "exemplar_ids", lambda _: [7])

    def alone(ids):
        return [torch.tensor(texts["e" if ids == [[7]] else "c"])]

    monkeypatch.setattr(reading, "alone", alone)
    (result,) = reading.read(EXEMPLARS, ["So much."])
    assert result.gains == pytest.approx([0, 0.4, 0.4, 0.4], abs=1e-6)
    assert (result.forward, result.back) == pytest.approx((0.3, 0.1), abs=1e-6)
    assert result.score == pytest.approx(0.2, abs=1e-6)


@pytest.mark.parametrize("rows", [module.ROWS_AT_ONCE, 1])
def test_a_reading_by_hand(reading, monkeypatch, rows):
    """And gains without an exemplar, for which nothing that was kept is pushed out."""
    monkeypatch.setattr(module, "ROWS_AT_ONCE", rows)
    exemplars = [*EXEMPLARS, "word " * 9]
    results = reading.read(exemplars, TEXTS)
    kept = [prefix.ids for prefix in reading._prefixes.kept]
    ids = [reading.candidate(text)[0] for text in TEXTS]
    without = reading.gains(exemplars[::2], ids, keep=False)
    assert [prefix.ids for prefix in reading._prefixes.kept] == kept
    writer = reading.exemplar_ids(exemplars)
    assert 20 < len(writer) <= 30
    for text, result, gains_without in zip(ids, results, without, strict=True):
        alone = plain(reading, reading.blank, text)
        for found, texts in ((gains_without.tolist(), exemplars[::2]), (result.gains, exemplars)):
            gains = plain(reading, texts, text) - alone
            gains[0] = 0
            assert found == pytest.approx(gains.tolist(), abs=1e-4)
        assert result.forward == pytest.approx(float(gains.mean()), abs=1e-4)
        back = plain(reading, [*text, *reading.blank], writer) - plain(
            reading, reading.blank, writer
        )
        assert result.back == pytest.approx(float(back[1:].sum()) / len(back), abs=1e-4)
    assert [result.back for result in reading.read([" "], TEXTS)] == [0.0] * len(TEXTS)


def test_nothing_else_matters(reading, judge, monkeypatch):
    """Neither the texts beside a candidate nor their order, what was read before, what is
    remembered of it, or the adapter that the model judges with, which stays."""
    adapter, model = reading.lora is not None, judge.model
    alone = [reader(judge, adapter).scores(EXEMPLARS, [text])[0] for text in TEXTS]
    with moved(model, 9).using(model):
        before = {name: matrix.adapter for name, matrix in matrices(model).items()}
        for remembered in (256, 2):
            monkeypatch.setattr(module, "REMEMBERED", remembered)
            assert reading.scores(EXEMPLARS, TEXTS) == pytest.approx(alone, abs=1e-4)
            for other in OTHERS:
                reading.scores(other, CANDIDATES[-2:])
            assert reading.scores(EXEMPLARS, TEXTS[::-1]) == pytest.approx(alone[::-1], abs=1e-4)
            assert len(reading._alone) <= remembered
        assert all(matrices(model)[name].adapter is adapter for name, adapter in before.items())


def test_what_was_read_is_not_computed_again(reading, monkeypatch):
    """The exemplars, and how likely texts are alone; a candidate after them is, and they after
    it."""
    first = reading.scores(EXEMPLARS, TEXTS)
    kind, rows = type(reading.model), list[int]()
    forward = kind.forward

    def counting(self, ids, *rest, **named):
        rows.append(len(ids))
        return forward(self, ids, *rest, **named)

    monkeypatch.setattr(kind, "forward", counting)
    assert reading.scores(EXEMPLARS, TEXTS) == first
    lengths, n = [len(reading.candidate(text)[0]) for text in TEXTS], len(TEXTS)
    contexts = sum(lengths) + n * (len(reading.blank) - 1)
    assert rows == [sum(lengths), contexts, n * len(reading.exemplar_ids(EXEMPLARS))]


def test_a_changed_adapter_reads_anew(judge):
    """Also where bitsandbytes changed it, which leaves no trace in `_version`."""
    reading = reader(judge)
    before, lora = reading.scores(EXEMPLARS, TEXTS), reading.lora
    assert lora is not None
    for part in lora.parameters():
        part.data.mul_(1.5)
    lora.refresh()
    anew = Reading(judge.model, judge.tokenizer, CONFIG, lora).scores(EXEMPLARS, TEXTS)
    assert reading.scores(EXEMPLARS, TEXTS) == anew != before


def test_topic_is_what_an_exemplar_alone_has(reading, monkeypatch):
    """Only such an exemplar is left out, and only candidates with a word of it are read again."""
    exemplars = ["The tractor broke; Zelda wept.", "Zelda wept. Supper was cold.", "So be it."]
    texts = ["So the tractor wept", "No Zelda, no supper", "So it goes"]
    calls, gains = [], [[0, 0.2, 4, 3], [0, 3, 2, 1.5], [0, 0.1, 0.1]]

    def without(rest, candidates, keep):
        calls.append((rest, candidates))
        assert not keep
        some = [ids == reading.candidate(texts[1])[0] for ids in candidates]
        return [torch.tensor([9.0, 0.0, 0.0, 0.4 if supper else 9.0]) for supper in some]

    monkeypatch.setattr(reading, "gains", without)
    readings = [
        TextReading(1.0, 0.0, some, [m.span() for m in re.finditer(r"\S+", text)])
        for text, some in zip(texts, gains, strict=True)
    ]
    words = reading.words(exemplars, texts, readings)
    first, second = ([reading.candidate(text)[0]] for text in texts[:2])
    assert calls == [(exemplars[1:], first), (exemplars[::2], second)]
    assert [[word.gain for word in some] for some in words] == gains
    assert [texts[i][w.start : w.end] for i in range(3) for w in words[i] if w.topic] == ["tractor"]
    calls.clear()
    alone = reading.words(exemplars[:1], texts, readings)  # of one exemplar nothing would be left
    assert (calls, [word for some in alone for word in some if word.topic]) == ([], [])


def test_what_is_saved_is_loaded(judge, tmp_path):
    made = reader(judge)
    made.config = replace(CONFIG, temperature=0.1)
    made.save(tmp_path, "some/base")
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["adapter_config.json", "adapter_model.safetensors", "reading.json"]
    found = Reading.load(tmp_path, judge.model, judge.tokenizer)
    assert found.config == made.config
    assert found.scores(EXEMPLARS, TEXTS) == made.scores(EXEMPLARS, TEXTS)
    assert found.lora is not None
    assert not any(part.requires_grad for part in found.lora.parameters())


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("exemplar_tokens", [None, 15, 20.5, True]),
        ("candidate_tokens", ["24", 0]),
        ("temperature", [0, -1, "warm"]),
        ("back_tokens", [None, 15, "x"]),
    ],
)
def test_a_broken_file_is_refused(judge, tmp_path, field, values):
    reader(judge).save(tmp_path, "some/base")
    file = tmp_path / "reading.json"
    sound = json.loads(file.read_text())
    broken = [sound | {field: value} for value in values]
    broken.append({k: v for k, v in sound.items() if k != field})
    for record in broken:
        file.write_text(json.dumps(record))
        refused(lambda: Reading.load(tmp_path, judge.model, judge.tokenizer), str(file), field)
