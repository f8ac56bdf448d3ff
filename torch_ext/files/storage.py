"""Safetensors files with a kind and a version, written atomically and validated when read.

A file is untrusted input. Its whole header is checked, against limits and against the file's size,
before any memory that it asks for is allocated. Callers of :func:`read_tensors` check names, dtypes
and values. Reading takes time linear in the file's size, and little more memory than the tensors.
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

from torch_ext.utils.user_warning import warn_user

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
    """Invalid contents of a file: ``FILE: FIELD: what is wrong with it``.

    The message may quote the file, so it is cut to 400 characters, and unprintable ones, such as a
    terminal's control sequences, are escaped.
    """

    def __init__(self, path: PathLike, what: str) -> None:
        if len(what) > _MAX_MESSAGE:
            what = what[:_MAX_MESSAGE] + "..."
        what = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in what)
        super().__init__(f"{os.fspath(path)}: {what}")


class _Entry(NamedTuple):
    """A tensor in the file: its bytes from ``begin`` to ``end``, counted after the header."""

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
    """Writes a file completely, or leaves the old one.

    Everything beside the tensors is JSON with sorted keys under a single key of the metadata, so
    equal contents give equal bytes.

    Args:
        path: the file.
        tensors: uint8, int32, int64 or float32, by name.
        kind: what the file is, such as ``"observer_params"``; :func:`read_tensors` compares it.
        version: of the format; compared as well.
        extra: further contents, as JSON values.

    Raises:
        FileError: a name, dtype or size that could not be read again.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
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
    """Writes a temporary file in the same folder, syncs it and renames it to ``path``.

    Raises OSError, naming ``path``, if that fails; the old file is left as it was.
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
        # The error has no path (a full disk), or the temporary file's.
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
    """Removes temporary files that killed processes left while they wrote ``path``."""
    target = Path(path)
    if target.parent.is_dir():
        for name in os.listdir(target.parent):
            if name.startswith(f".{target.name}.") and name.endswith(_PARTIAL):
                (target.parent / name).unlink(missing_ok=True)


def delete_checkpoint(who: str, path: PathLike) -> None:
    """Deletes the checkpoint of a complete call; if that fails, warns: what the call made stays."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        warn_user(f"{who}: complete, but its checkpoint could not be deleted: {error}")


def read_tensors(path: PathLike, kind: str, version: int) -> tuple[dict[str, Tensor], Any]:
    """Reads a file that :func:`write_tensors` wrote.

    Returns:
        The tensors by name, and the further contents (``extra``).

    Raises:
        FileError: invalid contents, or another kind or version; the message names the field.
        OSError: the file cannot be read.
    """
    if stat.S_ISFIFO(os.stat(path).st_mode):  # opening a pipe would block until there is a writer
        raise FileError(path, "header: expected a file, got a pipe")
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise FileError(path, f"header: truncated, or not a safetensors file ({size} bytes)")
        if length > _MAX_HEADER:
            raise FileError(
                path, f"header: expected a header of at most {_MAX_HEADER} bytes, got {length}"
            )
        header = _parse(path, "header", file.read(length))
        extra = _check_metadata(path, header, kind, version)
        entries = _check_entries(path, header, size - 8 - length)
        return {entry.name: _read_tensor(path, file, entry) for entry in entries}, extra


def _read_tensor(path: PathLike, file: BinaryIO, entry: _Entry) -> Tensor:
    """Reads a tensor at the file's position; entries are read in the order of their data."""
    tensor = torch.empty(entry.shape, dtype=entry.dtype)
    if tensor.numel():
        have = file.readinto(tensor.numpy().reshape(-1).view("u1"))  # type: ignore[attr-defined]
        if have != entry.end - entry.begin:
            raise FileError(path, f"{entry.name}: the file became shorter while it was read")
    return tensor


def read_object(path: PathLike, limit: int = _MAX_HEADER) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Raises:
        FileError: more than ``limit`` bytes, invalid JSON, or no object.
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        text = file.read(limit + 1)
    if len(text) > limit:
        raise FileError(path, f"expected at most {limit} bytes")
    return _parse(path, "content", text)


def _parse(path: PathLike, what: str, text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object; raises FileError for duplicate keys, NaN, infinity or deep nesting."""

    def object_from(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise ValueError(f'duplicate key "{name[:80]}"')
            content[name] = value
        return content

    def raise_for_constant(constant: str) -> None:
        raise ValueError(f"expected finite numbers, got {constant}")

    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        content = json.loads(text, object_pairs_hook=object_from, parse_constant=raise_for_constant)
    except (ValueError, RecursionError) as error:
        raise FileError(path, f"{what}: {error}") from error
    if not isinstance(content, dict):
        raise FileError(path, f"{what}: expected an object")
    if _is_deeper(content, _MAX_DEPTH):
        raise FileError(path, f"{what}: expected at most {_MAX_DEPTH} levels of nesting")
    return content


def _is_deeper(value: Any, levels: int) -> bool:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, list):
        return False
    return levels == 0 or any(_is_deeper(item, levels - 1) for item in value)


def _check_metadata(path: PathLike, header: dict[str, Any], kind: str, version: int) -> Any:
    """Removes the metadata from the header, checks kind and version, and returns the contents."""
    metadata = header.pop(_METADATA, None)
    text = metadata.get(_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise FileError(path, "not a file of torch_ext: its description is missing")
    description = _parse(path, "description", text)
    if description.get("kind") != kind:
        raise FileError(path, f"kind: expected {kind!r}, got {description.get('kind')!r}")
    if description.get("version") != version or isinstance(description["version"], bool):
        raise FileError(
            path, f"version: this release reads {version}, got {description.get('version')!r}"
        )
    return description.get("content")


def _check_size(path: PathLike, size: int) -> None:
    if size > _MAX_DATA:
        raise FileError(path, f"data: expected at most {_MAX_DATA} bytes, got {size}")


def _check_entries(path: PathLike, header: dict[str, Any], size: int) -> list[_Entry]:
    """The header's entries in the order of their data; raises FileError for gaps and overlaps."""
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
    """A tensor's entry; raises FileError unless its bytes agree with its shape and dtype."""

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
    # Beside a size of 0 the others are limited too: torch computes strides from them.
    if math.prod(max(size, 1) for size in shape) > _MAX_DATA:
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
    """What a tensor's name is expected to be, if it is not: of some length, or printable."""
    if not name or len(name.encode("utf-8", "replace")) > _MAX_NAME:
        return f"of 1 to {_MAX_NAME} bytes"
    return "" if name.isprintable() else "printable"
