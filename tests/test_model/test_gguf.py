"""The GGUF reader against the `gguf` library's own writer and reader, and against damage."""

from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_bases import refused, write_out

from nanopersrm import InputError
from nanopersrm.model.base import DEFAULT_BASE, resolve
from nanopersrm.model.gguf import read_gguf

TYPES = gguf.GGMLQuantizationType


def write(path: Path) -> Path:
    """A small file with every kind of value, a plain and two quantised tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_int64("a.negative", -7)
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.switch", True)
    writer.add_string("a.text", "späße ½")
    writer.add_array("a.words", ["", "zwölf", "x" * 300])
    writer.add_array("a.numbers", [1, -2, 3])
    values = np.linspace(-1, 1, 4 * 64, dtype=np.float32).reshape(4, 64)
    writer.add_tensor("plain", values)
    writer.add_tensor("half", values.astype(np.float16))
    for kind in (TYPES.Q4_1, TYPES.Q8_0):
        writer.add_tensor(kind.name, gguf.quantize(values, kind), raw_dtype=kind)
    write_out(writer)
    return path


def same_as_the_library(path: Path) -> None:
    ours, theirs = read_gguf(path), gguf.GGUFReader(path)
    expected = {name: f.contents() for name, f in theirs.fields.items() if "GGUF." not in name}
    assert ours.metadata == expected
    for mine, other in zip(ours.tensors, theirs.tensors, strict=True):
        for field in ("name", "tensor_type"):
            assert getattr(mine, field) == getattr(other, field)
        assert mine.rows == other.shape[-1]
        assert mine.data.dtype == other.data.dtype
        assert np.array_equal(mine.data, other.data)


def test_as_the_library_reads_it(tmp_path):
    same_as_the_library(write(tmp_path / "small.gguf"))


@pytest.mark.slow
@pytest.mark.base
def test_the_real_file():
    same_as_the_library(resolve(DEFAULT_BASE).path)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "small.gguf"
    whole = write(path).read_bytes()
    end = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(path).tensors)
    for size in [*range(1, 64), *range(64, end, 37), end - 1]:
        path.write_bytes(whole[:size])
        refused(lambda: read_gguf(path), str(path), "truncated")
    path.write_bytes(whole[:end])
    read_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_never_hang_or_escape(tmp_path, data):
    """Any damage to the header is an InputError or, where it hits a value, another value."""
    path = tmp_path / "flip.gguf"
    whole = bytearray(write(path).read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, 700))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole)
    with suppress(InputError):
        read_gguf(path)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"", "empty"),
        (b"<html>no", "b'<htm'"),
        (b"GGUF\x01\0\0\0", "version 2 or 3"),
        (b"GGUF\0\0\0\x03", "little-endian"),
        (b"GGUF\x03\0\0\0" + b"\xff" * 16, "string"),
        (b"GGUF\x03\0\0\0" + b"\0" * 8 + b"\xff" * 7 + b"\x0f" + b"\0" * 64, "twice"),
        (None, "readable"),
    ],
)
def test_garbage(tmp_path, content, part):
    path = tmp_path / "bad.gguf"
    if content is not None:
        path.write_bytes(content)
    refused(lambda: read_gguf(path), str(path), part)
