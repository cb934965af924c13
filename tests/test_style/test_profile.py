"""Words are true, writers differ, the table is sound."""

import gzip
import json
from dataclasses import fields
from pathlib import Path

import pytest

from nanopersrm.style import reference as builder
from nanopersrm.style.features import COUNTED, FACTORS, measure
from nanopersrm.style.profile import (
    Stats,
    factor_distance,
    figure,
    level,
    ngram_similarity,
    percentile,
    profile,
    reference,
)

DEMO = Path(__file__).parents[2] / "data" / "demo"
WRITERS = {
    folder.name: [path.read_text("utf-8") for path in sorted(folder.glob("*.txt"))]
    for folder in sorted(DEMO.iterdir())
}
EVERY_TEXT = [text for texts in WRITERS.values() for text in texts]


def test_reference_is_complete_and_sane() -> None:
    table = reference()
    assert list(table.factors) == [factor.name for factor in FACTORS]
    for stats in table.factors.values():
        assert stats.sd > 0
        assert stats.root_sd > 0
        assert 0 <= stats.reliability <= 1
        assert list(stats.quantiles) == sorted(stats.quantiles)
        assert (len(stats.quantiles) - 1) % 4 == 0  # the quarters are points of the table
    assert max(stats.reliability for stats in table.factors.values()) > 0.15
    for quantiles in (table.similarity, table.distance):
        assert list(quantiles) == sorted(quantiles)
        assert quantiles[0] >= 0
    path = Path(builder.__file__).parent / "factor_reference.json"
    assert path.stat().st_size < 60_000


@pytest.mark.parametrize("factor", FACTORS, ids=lambda factor: factor.name)
def test_level_words_agree_with_the_quantiles(factor) -> None:
    quantiles = reference().factors[factor.name].quantiles
    quarter = (len(quantiles) - 1) // 4
    words = [level(factor.name, value).split()[0] for value in quantiles]
    ranks = [factor.words.index(word) for word in words]
    assert ranks == sorted(ranks)  # a higher value never gets a lower word
    for value, word in zip(quantiles, words, strict=True):
        if factor.words == COUNTED:
            assert (word == "no") == (value == 0)
            if word == "many":
                assert value >= quantiles[-1 - quarter]
        elif factor.name != "british" and word in (factor.words[0], factor.words[-1]):
            low = word == factor.words[0]
            assert value < quantiles[quarter] if low else value >= quantiles[-1 - quarter]


@pytest.mark.parametrize(
    ("writer", "factor"),
    [
        ("zoe", "emoji"),
        ("cole", "sentence_length"),
        ("dolores", "exclamations"),
        ("imre", "hedges"),
        ("beatrice", "british"),
        ("tessa", "list_lines"),
        ("ray", "second_person"),
        ("iris", "questions"),
        ("grubb", "passives"),
        ("nell", "ellipses"),
        ("otto", "dashes"),
    ],
)
def test_the_habit_of_each_demo_writer_stands_out(writer: str, factor: str) -> None:
    values = {name: measure(texts)[factor] for name, texts in WRITERS.items()}
    extreme = min if factor == "sentence_length" else max
    best = extreme(v for v in values.values() if v is not None)
    assert values[writer] == best


def test_similarity() -> None:
    text = EVERY_TEXT[0]
    assert ngram_similarity([text], text) == pytest.approx(1.0)
    assert ngram_similarity([text], text.upper()) == pytest.approx(1.0)
    assert ngram_similarity([text], text.replace(" ", " \n ")) == pytest.approx(1.0)
    assert ngram_similarity([text], "zzz qqq xxx") == 0.0
    assert ngram_similarity([], text) == ngram_similarity([text], "") == 0.0


def test_distance() -> None:
    one, other = WRITERS["edmund"][0], WRITERS["zoe"][0]
    assert factor_distance([one], one) == 0.0
    assert factor_distance([one], other) == pytest.approx(factor_distance([other], one))
    # Nothing in common to judge on: as far as the median stranger, neither near nor far.
    middle = reference().distance[len(reference().distance) // 2]
    assert factor_distance([one], "") == middle > 0


def test_percentiles_and_figures_by_hand() -> None:
    ranks = [percentile([0, 0, 1, 3, 3], value) for value in (-1, 0, 0.5, 1, 2, 3, 4)]
    assert ranks == [0, 12.5, 37.5, 50, 62.5, 87.5, 100]
    assert [figure(x) for x in (0, 0.01, 0.4, 2.66, 9.95, 36.6)] == [
        "0", "under 0.1", "0.4", "2.7", "10", "37",
    ]  # fmt: skip


def test_the_profile_is_most_salient_first() -> None:
    traits = profile(WRITERS["edmund"], top=8)
    assert [t.salience for t in traits] == sorted((t.salience for t in traits), reverse=True)
    assert any(t.phrase.startswith("many semicolons (") for t in traits)
    assert "british" not in {t.factor for t in profile(["So it is."])}


def test_builder_is_deterministic_and_refuses_in_one_line(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    with gzip.open(corpora / "demo.jsonl.gz", "wt", encoding="utf-8") as out:
        for author, texts in WRITERS.items():
            for k, text in enumerate(texts[:2]):
                out.write(json.dumps({"author": author, "title": str(k), "text": text}) + "\n")
    monkeypatch.setattr(builder, "PAIRS", 20)
    for name in ("a.json", "b.json"):
        assert builder.main(["--corpora", str(corpora), "--out", str(tmp_path / name)]) == 0
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    table = json.loads((tmp_path / "a.json").read_text("utf-8"))
    assert table["pieces"] == 24
    assert set(table["factors"]["semicolons"]) == {field.name for field in fields(Stats)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json", "corpora"]

    capsys.readouterr()
    assert builder.main(["--corpora", str(tmp_path / "none"), "--out", str(tmp_path / "c")]) == 2
    with gzip.open(corpora / "demo.jsonl.gz", "at", encoding="utf-8") as out:
        out.write('{"author": "x"}\n')
    assert builder.main(["--corpora", str(corpora), "--out", str(tmp_path / "c")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "expected a folder with *.jsonl.gz" in said[0]
    assert "demo.jsonl.gz, line 25: " in said[1]
    assert not (tmp_path / "c").exists()
