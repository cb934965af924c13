"""The pair record: what is written is read back, and a wrong line is named with its field."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_bases import refused

from nanopersrm import InputError
from nanopersrm.pairs import check_twins, dump, parse, read, write

EXAMPLES = Path(__file__).parent / "test_data" / "examples.json"
RECORD, TWIN = (json.loads(EXAMPLES.read_text("utf-8"))[name] for name in ("pair", "twin"))


def lines_of(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return path


ODD = ["\u2028 line\u0085", "\ttab", '"quoted" \\ \n', "\U0001f389 é\x00", "0"]


def test_a_round_trip_keeps_everything(tmp_path):
    values = {"a": [1, 2.5, -0.0, 1e300, 2**70, None, True, {"b": ODD}], "": {}}
    pair = replace(parse(RECORD), twin="", exemplars=("b", *ODD), meta=values)
    pairs = [
        replace(pair, id=f"{i}", chosen=text + "!", question=text, weight=i / 3, extra={text: 1})
        for i, text in enumerate(ODD)
    ]
    first, second, packed = (tmp_path / name for name in ("a.jsonl", "b.jsonl", "c.jsonl.gz"))
    assert write(first, pairs) == len(pairs)
    assert read(first) == pairs
    write(second, read(first))
    assert second.read_bytes() == first.read_bytes()
    packed.write_bytes(gzip.compress(first.read_bytes()))
    assert read(packed) == pairs


def test_unknown_fields_are_kept_and_some_may_be_missing(tmp_path):
    path = lines_of(tmp_path / "a.jsonl", RECORD | {"twin": "", "note": {"b": [1, "é"]}})
    (pair,) = read(path)
    assert pair.extra == {"note": {"b": [1, "é"]}}
    assert json.loads(dump(pair)) == RECORD | {"twin": "", "note": {"b": [1, "é"]}}
    record = {name: value for name, value in RECORD.items() if name not in ("weight", "meta")}
    assert (parse(record).weight, parse(record).meta) == (1.0, {})


def test_a_missing_field_is_named():
    for name in RECORD.keys() - {"weight", "meta"}:
        with pytest.raises(InputError, match=f"line 2, field {name}: missing"):
            parse({key: value for key, value in RECORD.items() if key != name}, "line 2")


WRONG: dict[str, list[object]] = {
    "id": [7], "author": [" "], "twin": [None], "question": [[]], "split": ["dev", []],
    "exemplars": ["Hi.", []], "exemplars[1]": [["a", 1]], "exemplars[0]": [[" \n"]],
    "chosen": [["I'm in."]], "rejected": [RECORD["chosen"]], "weight": [True, "1", -1],
    "meta": ["x"],
}  # fmt: skip


@pytest.mark.parametrize(("place", "wrong"), [(k, v) for k, own in WRONG.items() for v in own])
def test_a_wrong_field_is_named(place: str, wrong: object, tmp_path: Path):
    change = {place.split("[")[0]: wrong}
    path = lines_of(tmp_path / "a.jsonl", TWIN | {"id": "9", "twin": ""}, RECORD | change)
    refused(lambda: read(path), f"{path}, line 2, field {place}: ")


@pytest.mark.parametrize("line", ["[]", "{", '{"weight": NaN}', "[" * 100_000, '{"a": "\\ud800"}'])
def test_a_line_that_is_no_object_is_named(line: str, tmp_path: Path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{line}\n", "utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl, line 2: expected a JSON object"):
        read(path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "d.jsonl").mkdir()
    for name, data, key in [
        ("a.jsonl", b'{"id": "\xff"}', "line 1: expected UTF-8"),
        ("a.jsonl.gz", b"plain", "cannot be read"),
        ("b.jsonl.gz", gzip.compress(dump(parse(RECORD)).encode())[:-9], "cannot be read"),
        ("b.jsonl", b"\n \n", "expected pairs"),
        ("none.jsonl", None, "No such file"),
        ("d.jsonl", None, "directory"),
    ]:
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=key):
            read(tmp_path / name)
    assert read(tmp_path / "b.jsonl", empty=True) == []


def test_a_byte_order_mark_and_blank_lines_are_no_fault(tmp_path):
    text = f"\ufeff{json.dumps(RECORD)}\r\n\n{json.dumps(TWIN)}"
    (tmp_path / "a.jsonl").write_text(text, "utf-8")
    assert [pair.id for pair in read(tmp_path / "a.jsonl")] == ["1a", "1b"]


def test_an_id_stands_once(tmp_path):
    path = lines_of(tmp_path / "a.jsonl", RECORD, TWIN, RECORD)
    with pytest.raises(InputError, match=r"line 3, field id: '1a'"):
        read(path)


@pytest.mark.parametrize(
    "change",
    [{"id": "9"}, {"twin": "x"}, {"chosen": "A."}, {"split": "test"}, {"exemplars": ["Me again."]}],
)
def test_a_wrong_twin_is_named(change: dict[str, object], tmp_path: Path):
    path = lines_of(tmp_path / "a.jsonl", RECORD, TWIN | change)
    with pytest.raises(InputError, match=r"pair '1a', field twin: "):
        read(path)


def test_twins_without_a_file():
    pair, twin = parse(RECORD), parse(TWIN)
    check_twins([pair, twin])
    check_twins([replace(pair, twin="")])
    for wrong in (pair, replace(pair, twin="1a")):
        with pytest.raises(InputError, match="pair '1a', field twin"):
            check_twins([wrong])


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, [parse(RECORD)])
    before = path.read_bytes()
    for bad in (
        replace(parse(TWIN), meta={"x": float("nan")}),
        replace(parse(TWIN), chosen="\ud800"),
    ):
        with pytest.raises(InputError, match="pair '1b'"):
            write(path, [parse(RECORD), bad])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["a.jsonl"]
    with pytest.raises(InputError, match="cannot be written"):
        write(tmp_path / "a.jsonl/b.jsonl", [])
