"""The build as a command: same seed, same bytes, also after an interruption; clear errors."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data import build
from data.build import DEMO, FILES, LIGHT, Config, check_recipe, demo_pairs, main, run, shares
from data.proposals import Rejection
from nanopersrm.pairs import KINDS, SPLITS, check_twins, digest, read


def small(out: Path, **changes: Any) -> Config:
    few = {"pairs": 30, "eval_pairs": 4, "kinds": "cross_author", "reuse": 2}
    return Config(**{"corpora": DEMO, "out": out, **few, **changes})


def files(out: Path) -> dict[str, bytes]:
    return {f"{split}.jsonl": (out / f"{split}.jsonl").read_bytes() for split in SPLITS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "pairs"
    main(small(out))
    return out


def test_the_files_hold_what_was_asked_for(built: Path):
    pairs = {s: read(built / f"{s}.jsonl", empty=True) for s in SPLITS}  # checks the twins
    assert [len(pairs[split]) for split in SPLITS] == [30, 4, 4, 0]
    authors = {split: {pair.author for pair in found} for split, found in pairs.items()}
    assert not authors["train"] & (authors["test"] | authors["validation"])
    for split, found in pairs.items():
        for pair, twin in zip(found[::2], found[1::2], strict=True):
            assert (pair.twin, pair.split, pair.kind) == (twin.id, split, "cross_author")
            assert 1 <= len(pair.exemplars) == len(twin.exemplars) <= 4
    assert {len(pair.exemplars) for pair in pairs["train"]} >= {1, 2, 3}
    assert sorted(file.name for file in built.iterdir()) == sorted(FILES)
    train = json.loads((built / "summary.json").read_text("utf-8"))["sets"][0]
    assert (train["split"], train["kind"], train["pairs"]) == ("train", "cross_author", 30)
    assert train["proposals"] == 15 + sum(train["rejected"].values())


def test_an_interrupted_build_goes_on(built, tmp_path, monkeypatch, capsys):
    made = build.make_chunk
    calls: list[str] = []

    def make_chunk(corpus, *arguments):
        calls.append(corpus.split)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(corpus, *arguments)

    monkeypatch.setattr(build, "CHUNK", 8)
    monkeypatch.setattr(build, "make_chunk", make_chunk)
    assert run(small(tmp_path)) == 130
    assert "goes on from here" in capsys.readouterr().err
    assert not (tmp_path / "train.jsonl").exists()
    assert len(list((tmp_path / "shards").iterdir())) == 2
    assert run(small(tmp_path)) == 0
    assert calls[:4] == ["train", "train", "validation", "validation"]
    again = len(calls) - 3
    assert files(tmp_path) == files(built)  # which was built with other chunks, too
    calls[:] = [""] * 3
    main(small(tmp_path / "whole"))
    assert len(calls) - 3 == again + 2  # what was done was not done again
    assert files(tmp_path / "whole") == files(built)
    main(small(tmp_path / "other", seed=1))
    assert files(tmp_path / "other") != files(built)


def test_a_finished_build_is_left_alone(built: Path, capsys: pytest.CaptureFixture[str]):
    before = {file.name: file.stat().st_mtime_ns for file in built.iterdir()}
    assert run(small(built)) == 0
    assert "already built" in capsys.readouterr().err
    assert {file.name: file.stat().st_mtime_ns for file in built.iterdir()} == before


def test_other_settings_need_another_folder(built, tmp_path, capsys):
    before = files(built)
    assert run(small(built, seed=5)) == 2
    assert "other settings (seed)" in capsys.readouterr().err
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "1.txt").write_text("Other writings.", "utf-8")
    assert run(small(built, corpora=tmp_path)) == 2
    assert "other settings (writings)" in capsys.readouterr().err
    assert files(built) == before
    out = tmp_path / "out"
    out.mkdir()
    for name in ("train.jsonl", "notes.txt"):
        (out / name).write_text("mine", "utf-8")
    assert run(small(out)) == 2
    assert "holds train.jsonl" in capsys.readouterr().err
    assert run(small(out, overwrite=True)) == 0
    assert (out / "notes.txt").read_text("utf-8") == "mine"
    assert files(out) == before


def test_a_broken_chunk_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(small(tmp_path)) == 130
    capsys.readouterr()
    shard = next((tmp_path / "shards").iterdir())
    for text in ('{"pairs": [', '{"pairs": [{}]}'):
        shard.write_text(text, "utf-8")
        assert run(small(tmp_path)) == 2
        said = capsys.readouterr().err
        assert shard.name in said
        assert said.count("\n") == 1


def test_used_up_writings_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PATIENCE", 2)
    main(small(tmp_path, pairs=400, reuse=1))
    train = json.loads((tmp_path / "summary.json").read_text("utf-8"))["sets"][0]
    assert train["pairs"] < train["wanted"] == 400
    assert next(iter(train["rejected"])) == "candidate already taken"
    check_twins(read(tmp_path / "train.jsonl"))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"pairs": 3}, "--pairs"),
        ({"pairs": 0}, "--pairs"),
        ({"eval_pairs": -2}, "--eval-pairs"),
        ({"model_pairs": 1}, "--model-pairs"),
        ({"kinds": "cross_autor"}, "--kinds"),
        ({"exemplars": (0, 2)}, "--exemplars"),
        ({"exemplars": (4, 1)}, "--exemplars"),
        ({"reuse": 0}, "--reuse"),
        ({"hold_out": ("novels",)}, "--hold-out"),
        ({"light": ("novels",)}, "--light"),
        ({"corpora": Path("/none")}, "/none"),
    ],
)
def test_a_wrong_flag_is_named(change: dict[str, Any], key: str, tmp_path: Path, capsys: Any):
    assert run(small(tmp_path / "out", **change)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"data.build: error: {key}")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_pairs_of_a_light_domain_weigh_less(tmp_path):
    assert run(small(tmp_path / "a")) == run(small(tmp_path / "b", light=("demo",))) == 0
    plain, light = (read(tmp_path / name / "train.jsonl") for name in "ab")
    assert {pair.weight for pair in light} == {LIGHT}
    assert [replace(pair, weight=1.0) for pair in light] == plain


def test_an_error_leaves_the_folder_free(tmp_path, capsys):
    anna = tmp_path / "mine" / "anna"
    anna.mkdir(parents=True)
    (anna / "1.txt").write_text("One writer alone.", "utf-8")
    out = tmp_path / "out"
    assert run(small(out, corpora=anna.parent)) == 2
    assert "no pair could be made" in capsys.readouterr().err
    assert run(small(out, hold_out=("x",))) == 2
    assert run(small(out, hold_out=("demo",))) == 2  # nobody is left to train on
    assert "train" in capsys.readouterr().err
    assert run(small(out)) == 0


def test_held_out_domains():
    pieces = [build.Piece("a", "t", None, "x", domain) for domain in (*build.HELD_OUT, "other")]
    assert build.held_out(pieces, None) == build.HELD_OUT
    assert build.held_out(pieces[1:], None) == build.held_out(pieces, ()) == ()
    corpus_of = build.split_corpora(build.read_corpora(DEMO), 0, ("demo",))
    sets, _ = build.build_sets(corpus_of, check_recipe(small(Path(), pairs=2)))
    assert [len(sets[split]) for split in SPLITS] == [0, 0, 0, 4]


def test_kinds_share_by_weight():
    assert list(shares(6000, KINDS, 750).values()) == [3000, 750, 750, 750, 750]
    assert list(shares(8, ("cross_author", "style_mimicking", "restyle"), 1).values()) == [4, 1, 3]
    assert list(shares(5, ("minor_replacement", "restyle"), 0).values()) == [3, 2]
    assert all(sum(shares(n, KINDS, most).values()) == n for n in range(50) for most in (0, 2, 99))


def test_a_kind_with_a_model_makes_many_at_once(monkeypatch):
    monkeypatch.setattr(
        "data.kinds.style_mimicking.proposals",
        lambda base, write, corpus, rngs, exemplars: [Rejection(base)] * len(rngs),
    )
    many = build.load_kind("style_mimicking", "a base", 0)
    corpus = build.split_corpora(build.read_corpora(DEMO), 0)["train"]
    recipe = build.Recipe(("style_mimicking",), {}, {}, (1, 2), 0, 2)
    chunk = build.make_chunk(corpus, "style_mimicking", 0, 3, many, build.Taken(2), recipe)
    assert chunk == build.Chunk([], build.CHUNK, {"a base": build.CHUNK})


def test_demo_pairs_are_the_same_bytes_everywhere():
    pairs = demo_pairs()
    assert digest(pairs) == "9e7b2b0a98bc119ee4306b124b6e56489a35d28e15f1b0f0f393c8ba464ebc59"
    assert Counter(pair.split for pair in pairs) == {"train": 200, "validation": 20, "test": 20}
    authors = {s: {p.author for p in pairs if p.split == s} for s in ("train", "test")}
    assert not authors["train"] & authors["test"]
    assert digest(demo_pairs(1, 20)) != digest(demo_pairs(2, 20))
