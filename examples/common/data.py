"""The images of the examples: Fashion-MNIST from idx files, else scikit-learn's digits."""

from __future__ import annotations

import gzip
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
SIDE = 28  # pixels
CLASSES = 10
MAX_IMAGES = 1_000_000  # a header that asks for more is refused before anything is allocated
MAGIC_IMAGES, MAGIC_LABELS = 0x803, 0x801  # idx: unsigned bytes, 3 dimensions and 1 dimension


class DataError(Exception):
    """A data file that is missing or is not what it should be; the text names file and fault."""


@dataclass(frozen=True)
class Dataset:
    """Images are float32 [N,1,28,28] in [0,1], labels int64 [N]."""

    name: str
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mirrored_is_same: bool  # whether a flipped image still shows its class
    note: str


def load(folder: str | Path | None = None) -> Dataset:
    """Reads Fashion-MNIST from `folder`; None means the Debian package's folder, else the digits.

    A folder that was asked for, or that exists, is read or refused; it is never silently replaced.
    """
    if folder is not None:
        return fashion_mnist(Path(folder))
    if DEBIAN_FOLDER.exists():
        return fashion_mnist(DEBIAN_FOLDER)
    return digits()


def fashion_mnist(folder: Path) -> Dataset:
    """Reads the four idx files of Fashion-MNIST, gzip-compressed or not, from one folder."""
    if not folder.is_dir():
        fault = "it is not a folder" if folder.exists() else "there is no such folder"
        raise DataError(f"data folder {str(folder)!r}: {fault}")
    train_images, train_labels = _read_part(folder, "train")
    test_images, test_labels = _read_part(folder, "t10k")
    note = f"Fashion-MNIST from {folder}: {len(train_images)} + {len(test_images)} images"
    return Dataset(
        "fashion_mnist", train_images, train_labels, test_images, test_labels, True, note
    )


def digits() -> Dataset:
    """scikit-learn's 1797 digits of 8x8, enlarged to 28x28; every fifth one is for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"data folder {str(DEBIAN_FOLDER)!r}: there is no such folder, and the digits that "
            "would replace it need scikit-learn; install one (apt install dataset-fashion-mnist, "
            "or pip install scikit-learn), or give a folder with --data"
        ) from error
    bunch = load_digits()
    small = torch.as_tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16  # levels 0..16
    images = torch.nn.functional.interpolate(
        small, size=(SIDE, SIDE), mode="bilinear", align_corners=False
    )
    labels = torch.as_tensor(bunch.target, dtype=torch.int64)
    test = torch.arange(len(labels)) % 5 == 0
    note = (
        f"NOTE: no Fashion-MNIST here ({DEBIAN_FOLDER} is missing and no folder was given): using "
        f"scikit-learn's digits instead, {int((~test).sum())} + {int(test.sum())} images of 8x8 "
        f"enlarged to {SIDE}x{SIDE}. The numbers below are not Fashion-MNIST's."
    )
    return Dataset("digits", images[~test], labels[~test], images[test], labels[test], False, note)


def augment(images: Tensor, mirrored_is_same: bool, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to 2 pixels; mirrors half of them where that is sound."""
    count = len(images)
    padded = torch.nn.functional.pad(images[:, 0], (2, 2, 2, 2))
    shift = torch.randint(0, 5, (2, count, 1), generator=generator)
    rows, columns = shift + torch.arange(SIDE)  # each [count, 28]
    if mirrored_is_same:
        flip = torch.rand(count, 1, generator=generator) < 0.5
        columns = torch.where(flip, columns.flip(1), columns)
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.unsqueeze(1)


def _read_part(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images_path = _find(folder, f"{part}-images-idx3-ubyte")
    labels_path = _find(folder, f"{part}-labels-idx1-ubyte")
    images = _read_idx(images_path, MAGIC_IMAGES, (SIDE, SIDE))
    labels = _read_idx(labels_path, MAGIC_LABELS, ())
    if len(images) != len(labels):
        raise DataError(
            f"{labels_path}: it holds {len(labels)} labels, but {images_path.name} holds "
            f"{len(images)} images"
        )
    if int(labels.max()) >= CLASSES:
        raise DataError(
            f"{labels_path}: label {int(labels.max())} found, expected 0 to {CLASSES - 1}"
        )
    return images.unsqueeze(1).float() / 255, labels.long()


def _find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise DataError(f"{folder / name}.gz: there is no such file (nor one without .gz)")


def _read_idx(path: Path, magic: int, item: tuple[int, ...]) -> Tensor:
    """Reads one idx file: magic, sizes (big-endian uint32 each), then the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            return _parse_idx(path, file, magic, item)
    except (OSError, EOFError, zlib.error) as error:  # gzip reports damage as any of the three
        raise DataError(f"{path}: it cannot be read: {error}") from error


def _parse_idx(path: Path, file: IO[bytes], magic: int, item: tuple[int, ...]) -> Tensor:
    fields = 2 + len(item)
    header = file.read(4 * fields)
    if len(header) < 4 * fields:
        raise DataError(f"{path}: its header is truncated at {len(header)} of {4 * fields} bytes")
    found_magic, count, *found_item = struct.unpack(f">{fields}I", header)
    if found_magic != magic:
        raise DataError(
            f"{path}: it is not the idx file it should be: expected it to begin with "
            f"{magic:#010x}, got {found_magic:#010x}"
        )
    if tuple(found_item) != item:
        raise DataError(f"{path}: expected images of {item}, got {tuple(found_item)}")
    if not 0 < count <= MAX_IMAGES:
        raise DataError(f"{path}: expected 1 to {MAX_IMAGES} items, its header says {count}")
    size = count * int(torch.Size(item).numel())
    content = bytearray(file.read(size + 1))  # one more, to see whether the file goes on
    if len(content) != size:
        fault = "goes on after" if len(content) > size else f"is truncated at {len(content)} of"
        raise DataError(f"{path}: its content {fault} the {size} bytes its header announces")
    return torch.frombuffer(content, dtype=torch.uint8).reshape(count, *item)
