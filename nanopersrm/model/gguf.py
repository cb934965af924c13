"""Read a GGUF file: its metadata and its tensors, in one strict walk over the header.

A GGUF file (version 2 or 3, little-endian) is a header and then a block of aligned tensor data:

    "GGUF" | version u32 | tensor count u64 | metadata count u64
    metadata:  key (u64 length + UTF-8) | type u32 | value
               where an array is: type u32 | count u64 | values
    tensors:   name | number of dimensions u32 | dimensions u64 each | type u32 | offset u64
    padding to `general.alignment` (32) | the data, each tensor at its offset from here

Dimensions are written innermost first: 576, 49152 is an embedding of 49,152 rows. The data is
memory-mapped; `weights.py` reads it.

The `gguf` library knows the quantised types. Its own reader takes seconds for a vocabulary where
this walk takes 0.1, and trusts counts, so a damaged header can send it round 2^60 steps. Here every
length is checked against the end of the file. Left out: big-endian files, arrays of arrays.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import Any

import gguf
import numpy as np

from nanopersrm import InputError
from nanopersrm.files import reason

VERSIONS = (2, 3)  # version 1 had 32-bit lengths and was replaced within weeks
STRING, ARRAY, BOOL = 8, 9, 7  # value type codes with a meaning beyond a number
NUMBERS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4"}
NUMBERS |= {7: "<u1", 10: "<u8", 11: "<i8", 12: "<f8"}  # type code -> numpy dtype
U32, U64 = 4, 10
PLAIN = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}
PLAIN |= {"I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
LENGTH = Struct("<Q").unpack_from


@dataclass(frozen=True)
class GgufTensor:
    """One stored matrix or vector, as `gguf.dequantize(data, tensor_type)` takes it."""

    name: str
    tensor_type: gguf.GGMLQuantizationType
    rows: int  # of a matrix; the numbers of a vector
    data: np.ndarray  # a view of the mapped file: rows outermost; uint8 blocks when quantised


@dataclass(frozen=True)
class GgufFile:
    """The whole header as Python values, and views of the data."""

    metadata: dict[str, Any]
    tensors: list[GgufTensor]


def read_gguf(path: Path) -> GgufFile:
    """Map `path` and read its header; damage is one `InputError` naming file and byte."""
    try:
        data = np.asarray(np.memmap(path, mode="r"))
    except (OSError, ValueError) as error:  # ValueError: it is empty
        raise InputError(f"{path}: expected a readable GGUF file ({reason(error)})") from error
    cursor = _Cursor(path, data)
    magic, version = bytes(cursor.take(4)), cursor.number(U32)
    if magic != b"GGUF" or version not in VERSIONS:
        raise InputError(
            f"{path}: expected b'GGUF' and version 2 or 3, little-endian, got {magic!r}, {version}"
        )
    tensor_count, pair_count = cursor.number(U64), cursor.number(U64)
    metadata: dict[str, Any] = {}
    for _ in range(pair_count):
        key = cursor.strings(1)[0]
        if key in metadata:
            raise cursor.error(f"each metadata key once, got {key!r} twice")
        metadata[key] = cursor.value(cursor.number(U32))
    entries = [cursor.tensor() for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1:
        raise InputError(f"{path}: expected a positive general.alignment, got {alignment!r}")
    start = -(-cursor.at // alignment) * alignment
    return GgufFile(metadata, [_tensor(path, data, start, *entry) for entry in entries])


def _tensor(
    path: Path, data: np.ndarray, start: int, name: str, dims: list[int], code: int, offset: int
) -> GgufTensor:
    """Check one tensor entry against the type table and the end of the file, and view its data."""
    if code not in gguf.GGML_QUANT_SIZES:
        raise InputError(f"{path}: tensor {name!r} has the unknown type {code}")
    kind = gguf.GGMLQuantizationType(code)
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    if not dims or dims[0] % block:
        raise InputError(f"{path}: tensor {name!r}: expected rows of {block}s, got {dims}")
    size = math.prod(dims) // block * block_bytes
    begin = start + offset
    if begin + size > len(data):
        raise InputError(
            f"{path}: tensor {name!r} should end at byte {begin + size}, but the file ends at "
            f"{len(data)}: it is truncated or damaged; fetch it again"
        )
    shape = tuple(reversed(dims))
    if kind.name not in PLAIN:
        shape = gguf.quant_shape_to_byte_shape(shape, kind)
    view = data[begin : begin + size].view(PLAIN.get(kind.name, "u1")).reshape(shape)
    return GgufTensor(name, kind, dims[-1], view)


class _Cursor:
    """A position in the header. It owns the offset and never moves past the end of the file."""

    def __init__(self, path: Path, data: np.ndarray):
        self.path, self.view, self.at = path, data.data, 0

    def error(self, expected: str) -> InputError:
        return InputError(
            f"{self.path}: expected {expected} at byte {self.at} of {len(self.view)}: "
            "the file is truncated or damaged; fetch it again"
        )

    def take(self, size: int) -> memoryview:
        if size > len(self.view) - self.at:
            raise self.error(f"{size} bytes")
        self.at += size
        return self.view[self.at - size : self.at]

    def numbers(self, code: int, count: int) -> list[Any]:
        dtype = np.dtype(NUMBERS[code])
        return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()

    def number(self, code: int) -> Any:
        return self.numbers(code, 1)[0]

    def strings(self, count: int) -> list[str]:
        """`count` strings in one tight loop: a vocabulary is 100,000 of them."""
        view, at, end, texts = self.view, self.at, len(self.view), []
        for _ in range(count):
            stop = at + 8 + LENGTH(view, at)[0] if at + 8 <= end else end + 1
            try:
                if stop > end:
                    raise ValueError
                texts.append(str(view[at + 8 : stop], "utf-8"))
            except ValueError as error:  # also of bytes that are not UTF-8
                self.at = at
                raise self.error("a string") from error
            at = stop
        self.at = at
        return texts

    def value(self, code: int) -> Any:
        if code == ARRAY:
            return self.values(self.number(U32), self.number(U64))
        value = self.values(code, 1)[0]
        return bool(value) if code == BOOL else value

    def values(self, code: int, count: int) -> list[Any]:
        if code == STRING:
            return self.strings(count)
        if code not in NUMBERS:
            raise self.error(f"a GGUF value type, got {code}")
        return self.numbers(code, count)

    def tensor(self) -> tuple[str, list[int], int, int]:
        """One entry of the tensor list: name, dimensions, type code, offset."""
        name, rank = self.strings(1)[0], self.number(U32)
        if rank > 4:  # GGML_MAX_DIMS
            raise self.error(f"at most 4 dimensions for tensor {name!r}, got {rank}")
        return name, self.numbers(U64, rank), self.number(U32), self.number(U64)
