"""Files of named tensors: safetensors, versioned, written atomically, distrusted when read.

A file's header is checked in full, against limits and against the file's size, before anything
of a size that it names is allocated; names, types and values are checked by those who read them.
"""

from __future__ import annotations

import json
import math
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

PathLike = str | os.PathLike[str]

_MAX_HEADER = 16 * 2**20
_MAX_ENTRIES = 10**6
_MAX_NAME = 1024
_MAX_RANK = 8
_BYTES = {"U8": 1, "I32": 4, "F32": 4, "I64": 8}
_DTYPES = {
    torch.uint8: "U8", torch.int32: "I32", torch.float32: "F32", torch.int64: "I64"
}  # fmt: skip
_METADATA = "__metadata__"
_KEY = "torch_ext"


class FileError(ValueError):
    """A file that cannot be read; names the file, and the field where there is one."""

    def __init__(self, path: PathLike, what: str) -> None:
        super().__init__(f"{os.fspath(path)}: {what}")


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "torch_ext: files need the package safetensors: pip install safetensors"
        ) from error
    return safetensors.torch


def write_tensors(
    path: PathLike, tensors: Mapping[str, Tensor], kind: str, version: int, extra: Any
) -> None:
    """Writes a file that holds all of this, or leaves what was there.

    One key of metadata holds everything beside the tensors, sorted, so equal content gives equal
    bytes.
    """
    library = _safetensors()
    for name, tensor in tensors.items():
        if problem := name_problem(name):
            raise FileError(path, f"expected names to be {problem}, got {name[:80]!r}")
        if tensor.dtype not in _DTYPES:
            raise FileError(path, f"{name}: unexpected dtype {tensor.dtype}")
    content = {"kind": kind, "version": version, "content": extra}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = library.save(plain, {_KEY: text})
    if int.from_bytes(data[:8], "little") > _MAX_HEADER:
        raise FileError(path, f"expected at most {_MAX_HEADER} bytes of names and descriptions")
    write_atomically(path, data)


def write_atomically(path: PathLike, data: bytes) -> None:
    """A file of the same folder is written, synced, and takes the name at once."""
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: expected the folder {target.parent} to exist")
    if target.is_symlink() or target.is_dir():
        kind = "symbolic link" if target.is_symlink() else "folder"
        raise FileExistsError(f"{target}: expected a file or nothing there, got a {kind}")
    partial = target.parent / f".{target.name}.{secrets.token_hex(8)}.partial"
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def read_tensors(path: PathLike, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the rest of a file that :func:`write_tensors` wrote."""
    library = _safetensors()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise FileError(path, f"truncated, or no safetensors file ({size} bytes)")
        if length > _MAX_HEADER:
            raise FileError(path, f"expected a header of at most {_MAX_HEADER} bytes, got {length}")
        header = _parse(path, "header", file.read(length))
        extra = _check_metadata(path, header, kind, version)
        _check_entries(path, header, size - 8 - length)
        file.seek(0)
        data = file.read(size)
    if len(data) != size:
        raise FileError(path, "changed while it was read")
    try:
        tensors: dict[str, Tensor] = library.load(data)
    except Exception as error:  # the library has an exception type of its own
        raise FileError(path, f"not a safetensors file: {error}") from error
    return tensors, extra


def read_object(path: PathLike, limit: int = _MAX_HEADER) -> dict[str, Any]:
    """A JSON file that holds an object, of at most `limit` bytes."""
    with open(path, "rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise FileError(path, f"expected at most {limit} bytes")
    return _parse(path, "content", text)


def _parse(path: PathLike, what: str, text: str | bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in pairs:
            if name in made:
                raise ValueError(f'duplicate key "{name[:80]}"')
            made[name] = value
        return made

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        found = json.loads(text, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"{what}: {error}") from error
    if not isinstance(found, dict):
        raise FileError(path, f"{what}: expected an object")
    return found


def _check_metadata(path: PathLike, header: dict[str, Any], kind: str, version: int) -> Any:
    metadata = header.pop(_METADATA, None)
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FileError(path, "not a file of torch_ext: its description is missing")
    found = _parse(path, "description", text)
    if found.get("kind") != kind:
        raise FileError(path, f"kind: expected {kind!r}, got {found.get('kind')!r}")
    if found.get("version") != version or isinstance(found["version"], bool):
        raise FileError(
            path, f"version: this release reads {version}, got {found.get('version')!r}"
        )
    return found.get("content")


def _check_entries(path: PathLike, header: dict[str, Any], size: int) -> None:
    if len(header) > _MAX_ENTRIES:
        raise FileError(path, f"expected at most {_MAX_ENTRIES} tensors, got {len(header)}")
    spans = []
    for name, entry in header.items():
        if problem := name_problem(name):
            raise FileError(path, f"expected names to be {problem}, got {name[:80]!r}")
        spans.append((*_span(path, name, entry), name))
    spans.sort()
    end = 0
    for begin, until, name in spans:
        if begin != end:
            raise FileError(path, f"{name}: expected data at offset {end}, got {begin}")
        end = until
    if end != size:
        raise FileError(path, f"truncated or too long: {end} bytes of data named, {size} there")


def _span(path: PathLike, name: str, entry: Any) -> tuple[int, int]:
    """Where a tensor's data lies, once it agrees with its shape and dtype."""

    def integers(field: str, count: int | None) -> list[int]:
        value = entry.get(field) if isinstance(entry, dict) else None
        if not (
            isinstance(value, list)
            and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in value)
            and len(value) <= _MAX_RANK
            and count in (None, len(value))
        ):
            raise FileError(path, f"{name}.{field}: expected sizes, got {str(value)[:80]}")
        return value

    shape = integers("shape", None)
    begin, end = integers("data_offsets", 2)
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BYTES:
        raise FileError(path, f"{name}.dtype: unknown {str(dtype)[:80]!r}; known: {list(_BYTES)}")
    if end - begin != math.prod(shape) * _BYTES[dtype]:
        raise FileError(path, f"{name}: {end - begin} bytes do not hold {dtype} of shape {shape}")
    return begin, end


def name_problem(name: str) -> str:
    """What a name in a file is expected to be, where it is something else."""
    if not name or len(name.encode("utf-8", "replace")) > _MAX_NAME:
        return f"of 1 to {_MAX_NAME} bytes"
    return "" if name.isprintable() else "printable"
