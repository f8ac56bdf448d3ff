"""Seeded damage to safetensors files: bits, lengths, numbers, names, and the JSON's structure."""

from __future__ import annotations

import json
import random
import re
import struct
from collections.abc import Callable
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 7.5, -0.0, 2**31, 2**40, 2**63, -(2**63), 10**400, 1e308,
    float("inf"), float("nan"), "", "x", "x" * 2000, "\x1b[31m\r\n", "\ud800", "../../x", "int99",
    "kl", "lsq", "__import__('os').system('true')", [], [[]], [-1], [0], [2**62] * 8, [0] * 9,
    [True], ["1"], {}, {"a": {"b": {"c": {}}}}, {"shape": [1]}, {"__class__": "os.system"},
)  # fmt: skip
NUMBERS = (0, 1, -1, 127, 2**31 - 1, -(2**31), 2**62, 2**63 - 1, -(2**63), 0x7F800000, 0x7FC00000)


def split(data: bytes) -> tuple[bytes, bytes]:
    """The header's text and the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    return data[8 : 8 + length], data[8 + length :]


def join(header: bytes, body: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + body


def mutated(data: bytes, seed: int) -> bytes:
    """Another file, the same for the same seed."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(MUTATORS)(rng, data)
    return data


def _flip(rng: random.Random, data: bytes, begin: int, end: int) -> bytes:
    out = bytearray(data)
    for _ in range(rng.randint(1, 6) if begin < end else 0):
        out[rng.randrange(begin, end)] ^= 1 << rng.randrange(8)
    return bytes(out)


def _body_at(data: bytes) -> int:
    """Where the tensors begin, or the end of a file that is cut before that."""
    return min(8 + int.from_bytes(data[:8], "little"), len(data))


def flip_header(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data, min(8, len(data)), _body_at(data))


def flip_body(rng: random.Random, data: bytes) -> bytes:
    return _flip(rng, data, _body_at(data), len(data))


def cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def shift(rng: random.Random, data: bytes) -> bytes:
    """Bytes inserted, left out, or there twice."""
    at = rng.randrange(len(data) + 1)
    size = rng.choice((1, 2, 8, 100))
    return rng.choice((
        data[:at] + rng.randbytes(size) + data[at:],
        data[:at] + data[at + size :],
        data[:at] + data[at : at + size] + data[at:],
    ))  # fmt: skip


def length(rng: random.Random, data: bytes) -> bytes:
    size = rng.choice((0, 1, 2**24, 2**24 + 1, 2**32, 2**63, 2**64 - 1, len(data), len(data) - 8))
    return struct.pack("<Q", max(size, 0)) + data[8:]


def number(rng: random.Random, data: bytes) -> bytes:
    """A number among the tensors."""
    at = _body_at(data)
    if len(data) - at < 8:
        return data
    at += rng.randrange((len(data) - at) // 4 - 1) * 4
    value = rng.choice(NUMBERS) & (2**64 - 1)
    return data[:at] + struct.pack("<Q", value)[: rng.choice((4, 8))] + data[at + 8 :]


def digits(rng: random.Random, data: bytes) -> bytes:
    """A number of the header's text."""
    header, body = data[8 : _body_at(data)], data[_body_at(data) :]
    found = list(re.finditer(rb"\d+", header))
    if not found:
        return data
    one = rng.choice(found)
    new = rng.choice(
        (b"-1", b"1e999", b"9" * 30, b"9" * 5000, b"0", b"01", b"NaN", b'"1"', b"null")
    )
    return join(header[: one.start()] + new + header[one.end() :], body)


def _places(value: Any) -> list[tuple[Any, Any]]:
    """Every container and key in a JSON value."""
    keys = value if isinstance(value, dict) else range(len(value))
    found = [(value, key) for key in keys]
    return found + [
        place for _, key in found if isinstance(value[key], (dict, list))
        for place in _places(value[key])
    ]  # fmt: skip


def _change(rng: random.Random, value: Any) -> None:
    places = _places(value)
    if not places:
        return
    container, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del container[key]
    elif kind == 1 and isinstance(container, dict):
        container[rng.choice(("", "x", "a\nb", "x" * 1100, key + "x"))] = container.pop(key)
    elif kind == 2:
        container[key] = rng.choice([c[k] for c, k in places])  # from elsewhere
    else:
        container[key] = rng.choice(HOSTILE)


def _structural(
    rng: random.Random, data: bytes, change: Callable[[random.Random, Any], None]
) -> bytes:
    try:
        header, body = split(data)
        parsed = json.loads(header)
        change(rng, parsed)
        return join(json.dumps(parsed).encode(), body)
    except (ValueError, struct.error, KeyError, TypeError, AttributeError):
        return data  # damaged before


def header(rng: random.Random, data: bytes) -> bytes:
    return _structural(rng, data, _change)


def description(rng: random.Random, data: bytes) -> bytes:
    def change(rng: random.Random, parsed: Any) -> None:
        inner = json.loads(parsed["__metadata__"]["torch_ext"])
        _change(rng, inner)
        parsed["__metadata__"]["torch_ext"] = json.dumps(inner)

    return _structural(rng, data, change)


MUTATORS = (
    flip_header, flip_body, cut, shift, length, number, digits, header, header, description,
    description, description,
)  # fmt: skip
