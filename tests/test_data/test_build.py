"""The build as a command: same seed, same bytes, also after an interruption; clear errors."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data import build, shards
from data.build import DEMO, demo_pairs, main, run
from data.drafts import Rejection
from data.kinds.cross_author import draft
from data.recipe import Config, Recipe, recipe, shares, span
from nanopersrm import InputError
from nanopersrm.pairs import KINDS, SPLITS, Pair, check_twins, read

SMALL: dict[str, Any] = {
    "corpora": DEMO,
    "pairs": 30,
    "eval_pairs": 4,
    "kinds": "cross_author",
    "reuse": 2,
}


def small(out: Path, **changes: Any) -> Config:
    return Config(**{**SMALL, "out": out, **changes})


def files(out: Path) -> dict[str, bytes]:
    return {f"{split}.jsonl": (out / f"{split}.jsonl").read_bytes() for split in SPLITS}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("build") / "pairs"
    main(small(out), "the command")
    return out


def test_the_files_hold_what_was_asked_for(built: Path):
    pairs = {s: read(built / f"{s}.jsonl", empty=True) for s in SPLITS}  # checks the twins
    assert {split: len(found) for split, found in pairs.items()} == {
        "train": 30,
        "validation": 4,
        "test": 4,
        "ood": 0,
    }
    authors = {split: {pair.author for pair in found} for split, found in pairs.items()}
    assert not authors["train"] & authors["test"]
    assert not authors["train"] & authors["validation"]
    for split, found in pairs.items():
        for pair, twin in zip(found[::2], found[1::2], strict=True):
            assert (pair.twin, pair.split, pair.kind) == (twin.id, split, "cross_author")
            assert 1 <= len(pair.exemplars) == len(twin.exemplars) <= 4
    assert {len(pair.exemplars) for pair in pairs["train"]} >= {1, 2, 3}
    assert sorted(file.name for file in built.iterdir()) == sorted(shards.FILES)


def test_the_summary_says_what_happened(built: Path):
    facts = json.loads((built / "summary.json").read_text("utf-8"))
    train = facts["sets"][0]
    assert (train["split"], train["kind"], train["pairs"]) == ("train", "cross_author", 30)
    assert train["proposals"] == 15 + sum(train["rejected"].values())
    assert train["accepted"] == round(15 / train["proposals"], 4)
    assert facts["writers"]["train"] == {"demo": 8}
    assert facts["command"] == "the command"
    assert [note.split(":")[0] for note in facts["notes"]] == ["ood"]
    page = (built / "summary.md").read_text("utf-8")
    assert "| train | cross_author | 30 | " in page
    assert "| train | 8 | 8 |" in page


def test_the_same_seed_gives_the_same_bytes(built: Path, tmp_path: Path):
    main(small(tmp_path))
    assert files(tmp_path) == files(built)
    main(small(tmp_path, seed=1, overwrite=True))
    assert files(tmp_path) != files(built)


def test_an_interrupted_build_goes_on(built, tmp_path, monkeypatch, capsys):
    made = build.make_chunk
    calls: list[str] = []

    def make_chunk(shelf, *arguments):
        calls.append(shelf.split)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return made(shelf, *arguments)

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


def test_a_finished_build_is_left_alone(built: Path, capsys: pytest.CaptureFixture[str]):
    before = {file.name: file.stat().st_mtime_ns for file in built.iterdir() if file.is_file()}
    assert run(small(built)) == 0
    said = capsys.readouterr()
    assert "already built" in said.err
    assert "| train | cross_author | 30 | " in said.out
    after = {file.name: file.stat().st_mtime_ns for file in built.iterdir() if file.is_file()}
    assert after == before


def test_other_settings_need_another_folder(built, tmp_path, capsys):
    before = files(built)
    assert run(small(built, seed=5)) == 2
    assert "was built with seed 0, now asked for 5" in capsys.readouterr().err
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "1.txt").write_text("Other writings.", "utf-8")
    assert run(small(built, corpora=tmp_path)) == 2
    assert "was built with writings" in capsys.readouterr().err
    assert files(built) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "train.jsonl").write_text("mine", "utf-8")
    assert run(small(tmp_path / "out")) == 2
    assert "holds train.jsonl of something else" in capsys.readouterr().err
    (tmp_path / "out" / "notes.txt").write_text("mine", "utf-8")
    assert run(small(tmp_path / "out", overwrite=True)) == 0
    assert (tmp_path / "out" / "notes.txt").read_text("utf-8") == "mine"
    assert files(tmp_path / "out") == before


def test_a_broken_chunk_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(build, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(small(tmp_path)) == 130
    capsys.readouterr()
    shard = next((tmp_path / "shards").iterdir())
    for text in ('{"pairs": [', "{}", '{"pairs": [{}]}'):
        shard.write_text(text, "utf-8")
        assert run(small(tmp_path)) == 2
        said = capsys.readouterr().err
        assert shard.name in said
        assert said.count("\n") == 1


def test_used_up_writings_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "PATIENCE", 2)
    main(small(tmp_path, pairs=400, reuse=1))
    (_, note) = json.loads((tmp_path / "summary.json").read_text("utf-8"))["notes"]
    assert note.startswith("train cross_author: ")
    assert "pairs of 400; then nearly all proposals were rejected: candidate already taken" in note
    check_twins(read(tmp_path / "train.jsonl"))


def test_no_pair_at_all_is_an_error(tmp_path, capsys):
    (tmp_path / "anna").mkdir()
    (tmp_path / "anna" / "1.txt").write_text("One writer alone.", "utf-8")
    assert run(small(tmp_path / "out", corpora=tmp_path)) == 2
    assert "no pair could be made: no other writer in the domain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pairs": 3}, "--pairs: expected an even number from 2, got 3"),
        ({"pairs": 0}, "--pairs: expected an even number from 2, got 0"),
        ({"eval_pairs": -2}, "--eval-pairs: expected an even number from 0, got -2"),
        ({"kinds": "cross_autor"}, "--kinds: expected names out of cross_author, minor_rep"),
        ({"kinds": " , "}, "got none"),
        ({"exemplars": "0-2"}, "--exemplars: expected A-B with 1 <= A <= B <= 16, got '0-2'"),
        ({"exemplars": "4-1"}, "--exemplars: expected A-B"),
        ({"words": "many"}, "--words: expected A-B with 20 <= A <= B <= 400, got 'many'"),
        ({"exemplar_words": "10-99"}, "--exemplar-words: expected A-B"),
        ({"reuse": 0}, "--reuse: expected a number from 1, got 0"),
        ({"hold_out": ("novels",)}, "--hold-out: expected domains out of demo, got 'novels'"),
        ({"corpora": Path("/none")}, "/none: no such file or folder"),
    ],
)
def test_a_wrong_flag_is_named(change: dict[str, Any], said: str, tmp_path: Path, capsys: Any):
    assert run(small(tmp_path / "out", **change)) == 2
    err = capsys.readouterr().err
    assert err.startswith("data.build: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_an_error_leaves_the_folder_free(tmp_path, capsys):
    anna = tmp_path / "mine" / "anna"
    anna.mkdir(parents=True)
    (anna / "1.txt").write_text("One writer alone.", "utf-8")
    out = tmp_path / "out"
    assert run(small(out, corpora=anna.parent)) == 2
    assert run(small(out, hold_out=("x",))) == 2
    assert run(small(out, hold_out=("demo",))) == 2  # nobody is left to train on
    assert "no pair could be made: no proposals" in capsys.readouterr().err
    assert run(small(out)) == 0


def test_a_held_out_domain_is_the_ood_split(tmp_path):
    config = small(tmp_path, pairs=2, hold_out=("demo",))
    pieces = build.read_writings(DEMO)
    assert build.held_out(pieces, None) == ()
    assert build.held_out(pieces, config.hold_out) == ("demo",)
    shelf_of = build.shelves(pieces, 0, ("demo",))
    sets, _ = build.build_sets(shelf_of, recipe(config))
    assert {split: len(found) for split, found in sets.items()} == {
        "train": 0,
        "validation": 0,
        "test": 0,
        "ood": 4,
    }
    big = [build.Piece("a", "t", None, "x", domain) for domain in (*build.HELD_OUT, "other")]
    assert build.held_out(big, None) == build.HELD_OUT
    assert build.held_out(big[1:], None) == ()
    assert build.held_out(big, ()) == ()


def test_a_kind_that_is_not_here_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(build.MODULES, "restyle", "data.no_such_kind")
    with pytest.raises(InputError, match=r"restyle cannot be made, data\.no_such_kind is missing"):
        recipe(small(tmp_path, kinds="cross_author,restyle"))


def test_defaults_and_ranges():
    assert (span("1-4", "x", 1, 9), span("3", "x", 1, 9)) == ((1, 4), (3, 3))
    asked = recipe(small(Path("x"), pairs=12_000, eval_pairs=None, kinds="cross_author"))
    assert asked.drafts == {"train": 6000, "validation": 300, "test": 300, "ood": 300}
    assert recipe(small(Path("x"), eval_pairs=None)).drafts["ood"] == 100


def test_kinds_share_by_weight():
    assert list(shares(6000, KINDS, 750).values()) == [3000, 750, 750, 750, 750]
    assert shares(7, ("cross_author", "restyle"), 1) == {"cross_author": 4, "restyle": 3}
    assert shares(7, ("cross_author",), 0) == {"cross_author": 7}
    assert shares(5, ("minor_replacement", "restyle"), 0) == {"minor_replacement": 3, "restyle": 2}
    assert shares(3, ("restyle",), 0) == {"restyle": 3}
    assert all(sum(shares(n, KINDS, most).values()) == n for n in range(50) for most in (0, 2, 99))


def test_a_kind_with_a_model_makes_many_at_once(tmp_path, monkeypatch):
    asked: list[tuple[str, int]] = []

    def load(base: str, seed: int, folder: Path | None) -> build.Propose:
        def propose(shelf, rngs, exemplars):
            asked.append((base, len(rngs)))
            return [
                draft(shelf, rng, n) if i % 2 else Rejection("restyle", "even")
                for i, (rng, n) in enumerate(zip(rngs, exemplars, strict=True))
            ]

        return propose

    module = type(sys)("data.model_kind")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "data.model_kind", module)
    monkeypatch.setitem(build.MODULES, "restyle", "data.model_kind")
    found = build.load_kind("restyle", "a base", 0, None)
    shelf = build.shelves(build.read_writings(DEMO), 0)["train"]
    chunk = build.make_chunk(
        shelf, "restyle", 0, 3, found, build.Taken(2), Recipe(("restyle",), {}, {}, (1, 2), 0, 2)
    )
    assert asked == [("a base", build.CHUNK)]
    assert len(chunk.pairs) == 6
    assert chunk.rejected["even"] >= 3
    assert chunk.proposals == 3 + sum(chunk.rejected.values())


def test_demo_pairs():
    pairs = demo_pairs()
    check_twins(pairs)
    assert pairs == demo_pairs(seed=0)
    assert pairs != demo_pairs(seed=1)
    by_split = {split: [p for p in pairs if p.split == split] for split in SPLITS}
    assert {split: len(found) for split, found in by_split.items()} == {
        "train": 200,
        "validation": 20,
        "test": 20,
        "ood": 0,
    }
    assert all(isinstance(pair, Pair) for pair in pairs)
    assert not {p.author for p in by_split["train"]} & {p.author for p in by_split["test"]}


def test_the_command_itself(tmp_path):
    command = [sys.executable, "-m", "data.build", "--corpora", str(DEMO), "--out", str(tmp_path)]
    flags = ["--kinds", "cross_author", "--pairs", "4", "--eval-pairs", "0", "--seed", "3"]
    root = Path(build.__file__).parents[1]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=90, cwd=root)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "summary.json").read_text("utf-8"))
    assert facts["command"] == " ".join(["python -m data.build", *command[3:], *flags])
    assert len(read(tmp_path / "train.jsonl")) == 4
    bad = subprocess.run(
        [*command, *flags[:-1], "4"], capture_output=True, text=True, timeout=90, cwd=root
    )
    assert bad.returncode == 2
    assert bad.stderr.endswith("take another --out, or --overwrite\n")
    assert "Traceback" not in bad.stderr


def test_a_draft_is_never_a_pair_twice(built: Path):
    texts = [frozenset((p.chosen, p.rejected)) for p in read(built / "train.jsonl")[::2]]
    assert len(texts) == len(set(texts))
