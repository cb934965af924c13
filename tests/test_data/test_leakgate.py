"""The leak gate: clean sets pass, and each planted leak is found and named."""

import json
import random
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from data.build import DEMO
from data.leakgate import ALL, HALF, WHOLE, Audit, Row, audit, main
from nanopersrm import InputError
from nanopersrm.judge.texts import read_file
from nanopersrm.pairs import Pair, check_twins, write

MARK = "zyx"
KINDS = ("cross_author", "restyle")


@cache
def texts() -> dict[str, list[str]]:
    """writer -> short passages of theirs, about 45 words each."""
    found = {}
    for folder in sorted(DEMO.iterdir()):
        words = [w for file in sorted(folder.glob("*.txt")) for w in read_file(file).split()]
        found[folder.name] = [" ".join(words[i : i + 45]) for i in range(0, len(words) - 45, 45)]
    return found


@cache
def clean(kinds: tuple[str, ...] = ("cross_author",)) -> tuple[Pair, ...]:
    """Complete twins of twelve writers, every two of them four times, the kinds by turns."""
    writers = list(texts())
    found: list[Pair] = []
    n = 0
    for i, first in enumerate(writers):
        for second in writers[:i]:
            for turn in range(4):
                a = texts()[first][(turn + i) % len(texts()[first])]
                b = texts()[second][(turn + n // 4) % len(texts()[second])]
                two = [(first, a), (second, b)]
                if random.Random(n).random() < 0.5:  # who is written first tells nothing
                    two.reverse()
                found += couple(f"p{n:04}", *two[0], *two[1], kinds[turn % len(kinds)])
                n += 1
    check_twins(found)
    return tuple(found)


def couple(id: str, one: str, a: str, two: str, b: str, kind: str) -> list[Pair]:
    def pair(
        id: str, twin: str, author: str, chosen: str, rejected: str, froms: tuple[str, str]
    ) -> Pair:
        exemplars = (f"other words of {author}",)
        return Pair(
            id, twin, author, "demo", "train", kind, exemplars, "", chosen, rejected, *froms
        )

    froms = f"{one}/{id}", f"{two}/{id}"
    return [
        pair(f"{id}a", f"{id}b", one, a, b, froms),
        pair(f"{id}b", f"{id}a", two, b, a, (froms[1], froms[0])),
    ]


def spoilt(change: Callable[[Pair], Pair], pairs: tuple[Pair, ...] | None = None) -> list[Pair]:
    """The clean set with each pair changed by itself: twins stand there and no longer match."""
    return [change(pair) for pair in pairs or clean()]


def alone(pairs: list[Pair]) -> list[Pair]:
    """Only the first of each couple, as sets without twins are."""
    return [replace(pair, twin="") for pair in pairs[::2]]


def sources(pair: Pair) -> list[str]:
    return [pair.chosen_from.split("/")[0], pair.rejected_from.split("/")[0]]


def row(found: Audit, probe: str, kind: str = ALL, scope: str = WHOLE) -> Row:
    (one,) = [r for r in found.rows if (r.probe, r.kind, r.scope) == (probe, kind, scope)]
    return one


def told(found: Audit, probe: str, kind: str = ALL) -> str:
    (one,) = [c for c in found.culprits if (c.probe, c.kind) == (probe, kind)]
    assert len(one.examples) == 3
    return "\n".join(one.lines())


def test_a_clean_set_passes():
    found = audit(clean(KINDS))
    assert not found.failed
    assert {r.verdict for r in found.rows if r.scope == WHOLE} <= {"ok", "unsure"}
    for kind in (ALL, *KINDS):
        for probe in ("length", "format", "n-grams", "machine", "twins"):
            one = row(found, probe, kind)
            assert (one.accuracy, one.low, one.high) == (0.5, 0.5, 0.5)
        assert row(found, "length", kind).n == row(found, "twins", kind).n
        assert row(found, "length", kind, HALF).n * 2 == row(found, "length", kind).n
    assert row(found, "position").accuracy < 0.6


def test_the_same_set_gives_the_same_audit():
    leaky = alone(spoilt(lambda pair: replace(pair, rejected=pair.rejected + " more words here")))
    assert audit(leaky, 1) == audit(leaky, 1)


def list_string(pair: Pair) -> Pair:
    return replace(pair, rejected=f"[{pair.rejected!r}]")


def longer(pair: Pair) -> Pair:
    return replace(pair, rejected=pair.rejected[: len(pair.chosen) - 9])


def unstripped(pair: Pair) -> Pair:
    return replace(pair, rejected=pair.rejected + "\n")


def watermarked(pair: Pair) -> Pair:
    words = pair.rejected.split()
    middle = len(pair.id + pair.rejected) % len(words)
    return replace(pair, rejected=" ".join([*words[:middle], MARK, *words[middle + 1 :]]))


def degenerate(pair: Pair) -> Pair:
    words = pair.rejected.split()
    return replace(pair, rejected=" ".join(words[:15] * (len(words) // 15)))


LEAKS = [
    (list_string, "format", "a list's string: more in rejected"),
    (longer, "length", "characters: more in chosen"),
    (unstripped, "format", "trailing blanks: more in rejected"),
    (watermarked, "n-grams", f"{MARK}"),
    (degenerate, "machine", "again: more in rejected"),
]


@pytest.mark.parametrize(("change", "probe", "said"), LEAKS)
@pytest.mark.parametrize("twins", ["broken", "absent"])
def test_a_planted_leak_is_named(change, probe, said, twins):
    leaky = spoilt(change) if twins == "broken" else alone(spoilt(change))
    found = audit(leaky)
    assert found.failed
    assert row(found, probe).verdict == "leak"
    assert row(found, probe).accuracy > 0.9
    assert said in told(found, probe)
    assert row(found, "twins").verdict == "leak"
    assert row(found, "twins").accuracy == 1.0


@pytest.mark.parametrize(("change", "probe", "said"), LEAKS)
def test_with_twins_the_same_texts_do_not_leak(change, probe, said):
    """The leak goes past no twin; the half without twins still shows what there was to find."""
    leaky: list[Pair] = []
    for pair in spoilt(change)[::2]:
        froms = pair.chosen_from, f"model:m:{pair.rejected_from.split('/')[0]}"
        one = replace(pair, rejected_from=froms[1])
        other = replace(
            clean()[len(leaky) + 1],
            chosen=pair.rejected,
            rejected=pair.chosen,
            chosen_from=froms[1],
            rejected_from=froms[0],
        )
        swap = len(leaky) % 3 == 0  # which of the two is written first tells nothing
        leaky += (
            [replace(other, id=one.id, twin=one.twin), replace(one, id=one.twin, twin=one.id)]
            if swap
            else [one, other]
        )
    check_twins(leaky)
    found = audit(leaky)
    assert row(found, probe).accuracy == 0.5
    assert row(found, probe, scope=HALF).accuracy > 0.9
    assert row(found, probe, scope=HALF).verdict == "for information"
    assert not [c for c in found.culprits if c.probe != "position"]


def test_a_leak_in_one_kind_is_found_there():
    pairs = spoilt(lambda p: unstripped(p) if p.kind == "restyle" else p, clean(KINDS))
    found = audit(alone(pairs))
    assert row(found, "format", "restyle").verdict == "leak"
    assert row(found, "format", "cross_author").verdict != "leak"
    assert "format, restyle: 1" in told(found, "format", "restyle")


def test_opposite_leaks_do_not_cancel():
    def change(pair: Pair) -> Pair:
        if pair.kind == "restyle":
            return replace(pair, chosen=pair.chosen + " ")
        return replace(pair, rejected=pair.rejected + " ")

    found = audit(alone(spoilt(change, clean(KINDS))))
    assert row(found, "format", "restyle").verdict == "leak"
    assert row(found, "format", "cross_author").verdict == "leak"


def reordered(first: Callable[[Pair, Pair], bool]) -> list[Pair]:
    """Complete twins, the couple written in an order that tells."""
    found = []
    for one, other in zip(clean()[::2], clean()[1::2], strict=True):
        if not first(one, other):
            one, other = (
                replace(other, id=one.id, twin=one.twin),
                replace(one, id=other.id, twin=other.twin),
            )
        found += [one, other]
    check_twins(found)
    return found


@pytest.mark.parametrize(
    ("first", "said"),
    [
        (lambda one, other: one.chosen < other.chosen, "chosen sorts first"),
        (lambda one, other: len(one.chosen) > len(other.chosen), "chosen has more characters"),
        (lambda one, other: one.chosen_from < other.chosen_from, "source that sorts first"),
    ],
)
def test_storage_that_tells_goes_past_twins(first, said):
    found = audit(reordered(first))
    assert row(found, "position").verdict == "leak"
    assert row(found, "position").accuracy > 0.9
    assert said in told(found, "position")
    assert {c.probe for c in found.culprits} == {"position"}


def test_a_rewrite_that_is_always_written_second_is_found():
    def rewrite(pair: Pair) -> Pair:
        froms = [pair.chosen_from, pair.rejected_from]
        froms[pair.id.endswith("a")] = "restyle:x:somebody"
        return replace(pair, chosen_from=froms[0], rejected_from=froms[1])

    found = audit(spoilt(rewrite))
    assert {c.probe for c in found.culprits} == {"position"}
    assert "chosen has a source of a person" in told(found, "position")


def at(place: int, change: Callable[[Pair], Pair]) -> list[Pair]:
    pairs = list(clean())
    pairs[place] = change(pairs[place])
    return pairs


@pytest.mark.parametrize(
    ("pairs", "fault", "places"),
    [
        (lambda: alone(list(clean())), "no twin is named", 264),
        (lambda: list(clean())[:-1], "the twin is not in the set", 1),
        (lambda: at(4, lambda p: replace(p, twin="p0000a")), "names another pair", 2),
        (lambda: at(4, lambda p: replace(p, twin=p.id)), "the pair itself", 1),
        (lambda: at(4, lambda p: replace(p, rejected=p.rejected + " ")), "other blanks", 2),
        (lambda: at(4, lambda p: replace(p, rejected=p.rejected + "x")), "has other texts", 2),
        (
            lambda: at(4, lambda p: replace(p, chosen=p.rejected, rejected=p.chosen)),
            "the twin chooses the same text",
            2,
        ),
        (lambda: at(4, lambda p: replace(p, chosen_from="me/x")), "gives other sources", 2),
        (lambda: at(4, lambda p: replace(p, split="test")), "has another split", 2),
        (lambda: at(4, lambda p: replace(p, weight=2.0)), "has another weight", 2),
        (lambda: at(4, lambda p: replace(p, question="Why?")), "has another question", 2),
        (lambda: at(4, lambda p: replace(p, exemplars=clean()[5].exemplars)), "an exemplar of", 2),
        (lambda: [*clean(), clean()[4]], "another pair has the same id", 2),
    ],
)
def test_a_single_broken_twin_fails(pairs, fault, places):
    found = audit(pairs())
    assert row(found, "twins").verdict == "leak"
    (culprit,) = [c for c in found.culprits if (c.probe, c.kind) == ("twins", ALL)]
    assert [f"({places} pairs)" in line for line in culprit.telling if fault in line] == [True]


def test_small_sets_say_so():
    found = audit(clean()[:20])
    assert not found.failed
    assert {r.verdict for r in found.rows if r.probe != "twins"} == {"too few"}
    writers = set(list(texts())[:3])  # enough pairs, too few strangers to learn from
    few = [p for p in spoilt(list_string) for _ in range(9) if set(sources(p)) <= writers]
    few = [replace(p, id=f"{p.id}{i}", twin="") for i, p in enumerate(few)]
    assert len(few) > 200
    assert row(audit(few), "format").verdict == "too few"
    with pytest.raises(InputError, match="expected pairs, got none"):
        audit([])


def test_the_table():
    lines = audit(clean()).table().splitlines()
    assert lines[0].startswith("| probe | kind | scope | judged | accuracy |")
    assert "| twins | all | all pairs | 528 | 50.0% | 50.0% to 50.0% | ok |" in lines
    assert len({line.count("|") for line in lines}) == 1
    assert "| length | all | all pairs | 0 |  |  | too few |" in audit(clean()[:20]).table()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    good, bad = str(tmp_path / "good.jsonl"), str(tmp_path / "bad.jsonl.gz")
    write(good, clean())
    write(bad, spoilt(list_string))
    said = tmp_path / "said.json"
    assert main([good]) == 0
    assert "leak gate: passed" in capsys.readouterr().out
    assert main([good, bad, "--json", str(said)]) == 1
    out = capsys.readouterr().out
    assert f"leak gate: failed for {bad}\n" in out
    assert "leak: format, all: 100.0% of 528 pairs" in out
    assert "told by: a list's string: more in rejected" in out
    assert "rejected '[" in out or 'rejected "[' in out
    facts = json.loads(said.read_text("utf-8"))
    assert [facts[name]["failed"] for name in (good, bad)] == [False, True]
    assert facts[good]["rows"][0] == vars(audit(clean()).rows[0])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.jsonl", "", "a.jsonl: expected pairs, found none"),
        ("a.jsonl", '{"id": "x"}', "a.jsonl, line 1, field twin: missing"),
        ("a.txt", "", "a.txt: expected a .jsonl or .jsonl.gz file"),
    ],
)
def test_a_file_that_cannot_be_used(name, text, message, tmp_path, capsys):
    (tmp_path / name).write_text(text, "utf-8")
    assert main([str(tmp_path / name)]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("data.leakgate: error: ")
    assert err.count("\n") == 1
    assert main([str(tmp_path / "none.jsonl")]) == 2
