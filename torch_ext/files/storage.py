"""Files of named tensors: safetensors, versioned, written atomically, distrusted when read.

A file's header is checked in full, against limits and against the file's size, before anything
of a size that it names is allocated; names, types and values are checked by those who read them.
Reading takes time linear in the file's size, and little more memory than the tensors take.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

PathLike = str | os.PathLike[str]

_MAX_HEADER = 16 * 2**20
_MAX_DATA = 4 * 2**30  # histograms of 16384 tensors, or of 174762 channels
_MAX_ENTRIES = 10**6
_MAX_NAME = 1024
_MAX_RANK = 8
_MAX_DEPTH = 8
_MAX_MESSAGE = 400
_DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F32": torch.float32, "I64": torch.int64}
_METADATA = "__metadata__"
_KEY = "torch_ext"
_PARTIAL = ".partial"


class FileError(ValueError):
    """A file that cannot be read or written: ``FILE: FIELD: what is wrong with it``.

    What a hostile file holds may be part of the text: it is cut, and shown without anything that
    a terminal would obey.
    """

    def __init__(self, path: PathLike, what: str) -> None:
        if len(what) > _MAX_MESSAGE:
            what = what[:_MAX_MESSAGE] + "..."
        what = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in what)
        super().__init__(f"{os.fspath(path)}: {what}")


class _Entry(NamedTuple):
    """Where a tensor's data lies, and as what."""

    begin: int
    end: int
    name: str
    dtype: torch.dtype
    shape: list[int]


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
            raise FileError(path, f"header: expected names to be {problem}, got {name[:80]!r}")
        if tensor.dtype not in _DTYPES.values():
            raise FileError(path, f"{name}: unexpected dtype {tensor.dtype}")
    _check_size(path, sum(tensor.numel() * tensor.itemsize for tensor in tensors.values()))
    content = {"kind": kind, "version": version, "content": extra}
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data: bytes = library.save(plain, {_KEY: text})
    if int.from_bytes(data[:8], "little") > _MAX_HEADER:
        raise FileError(
            path, f"header: expected at most {_MAX_HEADER} bytes of names and descriptions"
        )
    write_atomically(path, data)


def write_atomically(path: PathLike, data: bytes) -> None:
    """A file of the same folder is written, synced, and takes the name at once.

    Raises OSError naming ``path``, and leaves what was there, where that fails.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{target}: expected the folder {target.parent} to exist")
    if target.is_symlink() or target.is_dir():
        kind = "symbolic link" if target.is_symlink() else "folder"
        raise FileExistsError(f"{target}: expected a file or nothing there, got a {kind}")
    try:
        _replace(target, data)
    except OSError as error:
        # A full disk is reported without a name, a folder without permission by the partial's.
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error


def _replace(target: Path, data: bytes) -> None:
    partial = target.parent / f".{target.name}.{secrets.token_hex(8)}{_PARTIAL}"
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


def discard_partials(path: PathLike) -> None:
    """Removes what processes that were killed while they wrote this file have left beside it."""
    target = Path(path)
    if target.parent.is_dir():
        for name in os.listdir(target.parent):
            if name.startswith(f".{target.name}.") and name.endswith(_PARTIAL):
                (target.parent / name).unlink(missing_ok=True)


def read_tensors(path: PathLike, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the rest of a file that :func:`write_tensors` wrote.

    Raises FileError, which names the field, or OSError.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode):  # opening it would wait for a writer
        raise FileError(path, "header: expected a file, got a pipe")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            raise FileError(path, f"header: truncated, or no safetensors file ({size} bytes)")
        if length > _MAX_HEADER:
            raise FileError(
                path, f"header: expected a header of at most {_MAX_HEADER} bytes, got {length}"
            )
        header = _parse(path, "header", file.read(length))
        extra = _check_metadata(path, header, kind, version)
        entries = _check_entries(path, header, size - 8 - length)
        return {entry.name: _read_tensor(path, file, entry) for entry in entries}, extra


def _read_tensor(path: PathLike, file: BinaryIO, entry: _Entry) -> Tensor:
    """The next tensor; entries are in the order of their data."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if tensor.numel():
        have = file.readinto(tensor.numpy().reshape(-1).view("u1"))  # type: ignore[attr-defined]
        if have != entry.end - entry.begin:
            raise FileError(path, f"{entry.name}: the file became shorter while it was read")
    return tensor


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
    if _deeper(found, _MAX_DEPTH):
        raise FileError(path, f"{what}: expected at most {_MAX_DEPTH} levels of nesting")
    return found


def _deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(_deeper(one, levels - 1) for one in value)


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


def _check_size(path: PathLike, size: int) -> None:
    if size > _MAX_DATA:
        raise FileError(path, f"data: expected at most {_MAX_DATA} bytes, got {size}")


def _check_entries(path: PathLike, header: dict[str, Any], size: int) -> list[_Entry]:
    """In the order of their data, which they have to cover without gaps."""
    if len(header) > _MAX_ENTRIES:
        raise FileError(path, f"header: expected at most {_MAX_ENTRIES} tensors, got {len(header)}")
    _check_size(path, size)
    entries = []
    for name, entry in header.items():
        if problem := name_problem(name):
            raise FileError(path, f"header: expected names to be {problem}, got {name[:80]!r}")
        entries.append(_entry(path, name, entry))
    entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
    end = 0
    for entry in entries:
        if entry.begin != end:
            raise FileError(path, f"{entry.name}: expected data at offset {end}, got {entry.begin}")
        end = entry.end
    if end != size:
        raise FileError(path, f"data: truncated or too long: {end} bytes named, {size} there")
    return entries


def _entry(path: PathLike, name: str, entry: Any) -> _Entry:
    """A tensor's entry, once its place agrees with its shape and dtype."""

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
    if math.prod(max(size, 1) for size in shape) > _MAX_DATA:  # also where one of them is 0
        raise FileError(path, f"{name}.shape: expected at most {_MAX_DATA} values, got {shape}")
    begin, end = integers("data_offsets", 2)
    label = entry.get("dtype")
    if not isinstance(label, str) or label not in _DTYPES:
        raise FileError(path, f"{name}.dtype: unknown {str(label)[:80]!r}; known: {list(_DTYPES)}")
    dtype = _DTYPES[label]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise FileError(path, f"{name}: {end - begin} bytes do not hold {label} of shape {shape}")
    return _Entry(begin, end, name, dtype, shape)


def name_problem(name: str) -> str:
    """What a name in a file is expected to be, where it is something else."""
    if not name or len(name.encode("utf-8", "replace")) > _MAX_NAME:
        return f"of 1 to {_MAX_NAME} bytes"
    return "" if name.isprintable() else "printable"
