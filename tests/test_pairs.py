"""The pair record: what is written is read back, and a wrong line is named with its field."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanopersrm import InputError
from nanopersrm.pairs import KNOWN, Pair, check_twins, dump, iterate, parse, read, write

RECORD: dict[str, Any] = {
    "id": "1a",
    "twin": "1b",
    "author": "Anna",
    "domain": "mails",
    "split": "train",
    "kind": "cross_author",
    "exemplars": ["Hi there.", "Me again."],
    "question": "",
    "chosen": "I'm in.",
    "rejected": "One shall attend.",
    "chosen_from": "Anna/1",
    "rejected_from": "Boris/4",
    "weight": 1.0,
    "meta": {"year_1": None},
}
TWIN = RECORD | {
    "id": "1b",
    "twin": "1a",
    "author": "Boris",
    "exemplars": ["One begs to differ."],
    "chosen": RECORD["rejected"],
    "rejected": RECORD["chosen"],
    "chosen_from": "Boris/4",
    "rejected_from": "Anna/1",
}


def lines_of(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip)
NUMBERS = st.integers(-(2**60), 2**60) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS: st.SearchStrategy[Any] = st.none() | st.booleans() | TEXTS | NUMBERS
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3)
)
PAIRS = st.builds(
    Pair,
    id=TEXTS,
    twin=st.just(""),
    author=TEXTS,
    domain=TEXTS,
    split=st.sampled_from(["train", "validation", "test", "ood"]),
    kind=TEXTS,
    exemplars=st.lists(TEXTS, min_size=1, max_size=4).map(tuple),
    question=st.just("") | TEXTS,
    chosen=TEXTS,
    rejected=TEXTS,
    chosen_from=TEXTS,
    rejected_from=TEXTS,
    weight=st.floats(0, 1e9),
    meta=st.dictionaries(TEXTS, JSON, max_size=3),
    extra=st.dictionaries(TEXTS.filter(lambda name: name not in KNOWN), JSON, max_size=3),
).filter(lambda pair: pair.chosen != pair.rejected)


@settings(max_examples=40)
@given(st.lists(PAIRS, min_size=1, max_size=4, unique_by=lambda pair: pair.id))
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_round_trip_keeps_everything(
    suffix: str, tmp_path_factory: pytest.TempPathFactory, pairs: list[Pair]
):
    first = tmp_path_factory.mktemp("pairs") / f"a{suffix}"
    second = first.with_name(f"b{suffix}")
    assert write(first, pairs) == len(pairs)
    again = read(first)
    assert again == pairs
    write(second, again)
    assert second.read_bytes() == first.read_bytes()


def test_unknown_fields_are_kept(tmp_path):
    path = lines_of(tmp_path / "a.jsonl", RECORD | {"twin": "", "note": {"b": [1, "é"]}})
    (pair,) = read(path)
    assert pair.extra == {"note": {"b": [1, "é"]}}
    assert json.loads(dump(pair)) == RECORD | {"twin": "", "note": {"b": [1, "é"]}}


def test_weight_and_meta_may_be_missing():
    record = {name: value for name, value in RECORD.items() if name not in ("weight", "meta")}
    assert (parse(record).weight, parse(record).meta) == (1.0, {})


@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("weight", "meta")])
def test_a_missing_field_is_named(name: str, tmp_path: Path):
    record = {key: value for key, value in TWIN.items() if key != name}
    path = lines_of(tmp_path / "a.jsonl", RECORD, record)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == f"{path}, line 2, field {name}: missing"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": 7}, "field id: expected some text, got the number 7"),
        ({"author": " "}, "field author: expected some text, got an empty text"),
        ({"twin": None}, "field twin: expected a text, got null"),
        ({"question": []}, "field question: expected a text, got a list"),
        ({"split": "dev"}, "field split: expected one of train, validation, test, ood, got the"),
        ({"split": []}, "field split: expected one of train, validation, test, ood, got a list"),
        ({"exemplars": "Hi."}, "field exemplars: expected a list of texts, got the text 'Hi.'"),
        ({"exemplars": []}, "field exemplars: expected a list of texts, got an empty list"),
        ({"exemplars": ["a", 1]}, "field exemplars[1]: expected some text, got the number 1"),
        ({"chosen": ["I'm in."]}, "field chosen: expected some text, got a list"),
        ({"rejected": RECORD["chosen"]}, "field rejected: expected another text than chosen"),
        ({"weight": True}, "field weight: expected a number from 0, got true"),
        ({"weight": -1}, "field weight: expected a number from 0, got the number -1"),
        ({"meta": "x"}, "field meta: expected an object, got the text 'x'"),
    ],
)
def test_a_mistyped_field_is_named(change: dict[str, Any], said: str, tmp_path: Path):
    path = lines_of(tmp_path / "a.jsonl", RECORD | change)
    with pytest.raises(InputError) as error:
        list(iterate(path))
    assert str(error.value).startswith(f"{path}, line 1, {said}")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_file_without_pairs_is_named(text: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        read(path)
    assert str(error.value) == f"{path}: expected pairs, found none"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[]", "expected a JSON object, got a list"),
        ("{", "expected a JSON object, found none"),
        ('{"weight": NaN}', "a number is not finite: NaN"),
        ('{"weight": 1e999}', "a number is not finite: 1e999"),
        ("[" * 100_000, "expected a JSON object, found none"),
        ('{"a": "\\ud800"}', "half a character"),
    ],
)
def test_a_line_that_is_no_object_is_named(line: str, said: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n", "utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: ") as error:
        read(path)
    assert said in str(error.value)


def test_files_that_cannot_be_read(tmp_path):
    for name, data, said in [
        ("a.jsonl", b'{"id": "\xff"}', "line 1: expected UTF-8"),
        ("a.jsonl.gz", b"plain", "broken gzip"),
        ("b.jsonl.gz", gzip.compress(dump(parse(RECORD)).encode())[:-9], "broken gzip"),
        ("a.txt", b"", "expected a .jsonl or .jsonl.gz file"),
    ]:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=said):
            read(tmp_path / name)
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "d.jsonl").mkdir()
    with pytest.raises(InputError, match="found a folder"):
        read(tmp_path / "d.jsonl")


def test_a_byte_order_mark_and_blank_lines_are_no_fault(tmp_path):
    text = f"\ufeff{json.dumps(RECORD)}\r\n\n{json.dumps(TWIN)}"
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    assert [pair.id for pair in read(tmp_path / "a.jsonl")] == ["1a", "1b"]


def test_an_id_stands_once(tmp_path):
    path = lines_of(tmp_path / "a.jsonl", RECORD, TWIN, RECORD)
    with pytest.raises(InputError, match=r"line 3, field id: '1a' is also the id of .*line 1"):
        list(iterate(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"id": "9"}, "no pair has the id '1b'"),
        ({"twin": "x"}, "the twin of '1b' is 'x', not '1a'"),
        ({"chosen": "Other."}, "to have the same two texts in opposite roles"),
        ({"split": "test"}, "'1b' is in test, this one in train"),
        ({"exemplars": ["Me again."]}, "to have other exemplars"),
    ],
)
def test_a_wrong_twin_is_named(change: dict[str, Any], said: str, tmp_path: Path):
    path = lines_of(tmp_path / "a.jsonl", RECORD, TWIN | change)
    with pytest.raises(InputError, match=r"line 1, field twin: ") as error:
        read(path)
    assert said in str(error.value)
    assert len(list(iterate(path))) == 2  # each pair by itself is sound


def test_twins_without_a_file():
    pair, twin = parse(RECORD), parse(TWIN)
    check_twins([pair, twin])
    check_twins([replace(pair, twin="")])
    with pytest.raises(InputError, match="pair '1a', field twin: no pair has the id '1b'"):
        check_twins([pair])
    with pytest.raises(InputError, match="got its own"):
        check_twins([replace(pair, twin="1a")])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [parse(RECORD)])
    before = path.read_bytes()
    for bad in (
        replace(parse(TWIN), meta={"x": float("nan")}),
        replace(parse(TWIN), chosen="\ud800"),
        replace(parse(TWIN), extra={"id": "2"}),
    ):
        with pytest.raises(InputError, match="pair '1b'"):
            write(path, [parse(RECORD), bad])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "none" / "a.jsonl", [])
    with pytest.raises(InputError, match="expected a name that ends in"):
        write(tmp_path / "a.json", [])
