"""Parquet files byte by byte, that no library would write."""

import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

I32, I64, BINARY, LIST, STRUCT = 5, 6, 8, 9, 12
MAGIC = b"PAR1"
_GZIP = 2


def varint(number: int) -> bytes:
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def integer(number: int) -> bytes:
    return varint(number << 1 if number >= 0 else (-number << 1) - 1)


def text(value: str) -> bytes:
    return varint(len(value.encode())) + value.encode()


def items(kind: int, *values: bytes) -> bytes:
    return bytes([0xF0 | kind]) + varint(len(values)) + b"".join(values)


def structure(**fields: tuple[int, bytes]) -> bytes:
    """Write fields named f1, f2, …, as (type, value), in the order of their numbers."""
    out, before = b"", 0
    for name, (kind, value) in fields.items():
        number = int(name[1:])
        out += bytes([(number - before) << 4 | kind]) + value
        before = number
    return out + b"\0"


def element(name: str, *, children: int = 0) -> bytes:
    """An element of a schema: a group, or an optional leaf of bytes."""
    if children:
        return structure(f3=(I32, integer(1)), f4=(BINARY, text(name)), f5=(I32, integer(children)))
    return structure(
        f1=(I32, integer(6)),
        f3=(I32, integer(0)),
        f4=(BINARY, text(name)),
        f6=(I32, integer(0)),  # UTF8
    )


def with_footer(body: bytes, footer: bytes) -> bytes:
    return MAGIC + body + footer + struct.pack("<I", len(footer)) + MAGIC


def footer(schema: bytes, *, num_rows: int = 0, groups: tuple[bytes, ...] = ()) -> bytes:
    return structure(
        f1=(I32, integer(1)),
        f2=(LIST, schema),
        f3=(I64, integer(num_rows)),
        f4=(LIST, items(STRUCT, *groups)),
    )


def deeply_nested(depth: int) -> bytes:
    """A file without rows whose one column lies in that many groups."""
    elements = [element("group", children=1)] * depth
    return with_footer(b"", footer(items(STRUCT, *elements, element("leaf"))))


def page_bomb(num_bytes: int) -> bytes:
    """A file of one row: a text of so many NULs, in some kilobytes of gzip."""
    packer = zlib.compressobj(9, wbits=31)
    packed = packer.compress(struct.pack("<I", num_bytes))
    zeros = bytes(2**20)
    for _ in range(num_bytes // 2**20):
        packed += packer.compress(zeros)
    packed += packer.flush()
    values = structure(
        f1=(I32, integer(1)), f2=(I32, integer(0)), f3=(I32, integer(3)), f4=(I32, integer(3))
    )
    head = structure(
        f1=(I32, integer(0)),
        f2=(I32, integer(num_bytes + 4)),
        f3=(I32, integer(len(packed))),
        f5=(STRUCT, values),
    )
    body = head + packed
    told = structure(
        f1=(I32, integer(6)),
        f2=(LIST, items(I32, integer(0))),
        f3=(LIST, items(BINARY, text("text"))),
        f4=(I32, integer(_GZIP)),
        f5=(I64, integer(1)),
        f6=(I64, integer(100)),  # a lie: what it unfolds to
        f7=(I64, integer(len(body))),
        f9=(I64, integer(len(MAGIC))),
    )
    chunk = structure(f2=(I64, integer(len(MAGIC))), f3=(STRUCT, told))
    group = structure(f1=(LIST, items(STRUCT, chunk)), f2=(I64, integer(100)), f3=(I64, integer(1)))
    schema = items(STRUCT, element("schema", children=1), element("text"))
    return with_footer(body, footer(schema, num_rows=1, groups=(group,)))


def unfolding(path: Path, *, num_rows: int, num_chars: int) -> None:
    """Write rows of one long text, which the file holds once."""

    def column(*values: str) -> pa.DictionaryArray:
        indices = [row % len(values) for row in range(num_rows)]
        return pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(values))

    rows = pa.table({"text": column("x" * num_chars), "label": column("a", "b")})
    pq.write_table(rows, path, compression="zstd")
