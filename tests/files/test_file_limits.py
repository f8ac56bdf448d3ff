"""Reading and writing files: bounded memory, linear time, and disks and folders that refuse."""

from __future__ import annotations

import errno
import gc
import json
import os
import resource
import struct
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nets.tiny_net import calibrated
from torch_ext import FakeQuantize, get_default_calib_qconfig, save_observer_params
from torch_ext.files.observer_params import read_observer_params
from torch_ext.files.storage import discard_partials, read_tensors, write_atomically, write_tensors


def sparse(path: Path, entries: dict[str, object], size: int) -> None:
    """A file whose data is a hole: it takes no space, and reads as zeros."""
    content = json.dumps({"kind": "k", "version": 1, "content": None})
    header = json.dumps({"__metadata__": {"torch_ext": content}, **entries}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    os.truncate(path, 8 + len(header) + size)


@pytest.mark.parametrize("size", [2**32 + 8, 2**40], ids=["4GiB", "1TiB"])
def test_too_much_data_is_refused_before_it_is_read(tmp_path: Path, size: int) -> None:
    path = tmp_path / "huge"
    entry = {"dtype": "U8", "shape": [size // 8, 8], "data_offsets": [0, size]}
    sparse(path, {"x": entry}, size)
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{path}: data: expected at most 4294967296 bytes, got"):
        read_tensors(path, "k", 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_too_much_data_is_not_written(tmp_path: Path) -> None:
    wide = torch.zeros(1, dtype=torch.int64).expand(2**30, 1)  # 8 GiB, in 8 bytes
    with pytest.raises(ValueError, match="data: expected at most 4294967296 bytes, got 8589934592"):
        write_tensors(tmp_path / "x", {"x": wide}, "k", 1, None)
    assert os.listdir(tmp_path) == []


def peak_of(path: Path) -> int:
    """What a reader's memory grew by, in bytes, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets the peak back
            before = resident("VmRSS")
            read_tensors(path, "k", 1)
            os.write(writing, str(resident("VmHWM") - before).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        return int(pipe.read())


def resident(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(key))
    return int(line.split()[1]) * 1024


def test_reading_takes_little_more_memory_than_the_tensors(tmp_path: Path) -> None:
    path, size = tmp_path / "large", 2**27
    begin = {"dtype": "I64", "shape": [2**23], "data_offsets": [0, size // 2]}
    end = {"dtype": "F32", "shape": [2**24], "data_offsets": [size // 2, size]}
    sparse(path, {"a": begin, "b": end}, size)
    assert size < peak_of(path) < 1.25 * size


def calls(work: Callable[[], object]) -> int:
    """How many functions it calls; not the collector's callbacks and finalizers of other tests."""
    count = 0

    def profile(*_: object) -> None:
        nonlocal count
        count += 1

    gc.collect()
    gc.disable()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def test_reading_is_linear_in_the_number_of_quantizers(tmp_path: Path) -> None:
    def work(count: int) -> int:
        path = tmp_path / str(count)
        net = nn.ModuleDict({f"q{i}": FakeQuantize() for i in range(count)})
        save_observer_params(net, path)
        read_observer_params(path)  # what it keeps for the next time, it has
        return calls(lambda: read_observer_params(path))

    one, two, four = work(50), work(100), work(200)
    assert (four - two) / (two - one) == pytest.approx(2, rel=0.02)


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: header: expected a file, got a pipe"):
        read_observer_params(path)


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_devices_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"{path}: header: truncated, or not a safetensors file"):
        read_observer_params(path)


class TestWriting:
    @pytest.fixture
    def old(self, tmp_path: Path) -> Path:
        path = tmp_path / "params.safetensors"
        write_atomically(path, b"what was there")
        return path

    def untouched(self, path: Path) -> bool:
        return path.read_bytes() == b"what was there" and os.listdir(path.parent) == [path.name]

    def test_a_full_disk(self, old: Path) -> None:
        """A limit on the size of files fails in the middle of a write, as a full disk does."""
        net = calibrated(get_default_calib_qconfig())
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            with pytest.raises(OSError, match=str(old)) as caught:
                save_observer_params(net, old)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert caught.value.errno == errno.EFBIG
        assert self.untouched(old)

    def test_no_space_is_reported_with_the_files_name(
        self, old: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"No space left on device: '{old}'"):
            write_atomically(old, b"new")
        assert self.untouched(old)

    def test_a_folder_that_takes_no_files(self) -> None:
        with pytest.raises(OSError, match="'/proc/self/params'"):
            write_atomically("/proc/self/params", b"new")

    def test_a_name_that_is_too_long(self, old: Path) -> None:
        with pytest.raises(OSError, match=r"File name too long: '.*yyy'"):
            write_atomically(old.with_name("y" * 250), b"new")
        assert self.untouched(old)

    def test_partial_files_of_others_stay(self, old: Path) -> None:
        for name in (f".{old.name}.0123.partial", ".other.0123.partial", f".{old.name}.txt"):
            (old.parent / name).write_bytes(b"")
        discard_partials(old)
        assert sorted(os.listdir(old.parent)) == [
            ".other.0123.partial",
            f".{old.name}.txt",
            old.name,
        ]


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    """Every dtype, without elements, without axes, and in an order that no name suggests."""
    generator = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {"z": torch.tensor(2.5), "none": torch.zeros(2, 0, 3).int()}
    for i, dtype in enumerate((torch.uint8, torch.int64, torch.float32, torch.int32)):
        for size in range(1, 6):
            values = torch.randint(0, 256, (size, 3), generator=generator)
            tensors[f"{size * 7 % 5}.{i}"] = values.to(dtype).t()
    write_tensors(tmp_path / "x", tensors, "k", 1, {"a": [1]})
    found, extra = read_tensors(tmp_path / "x", "k", 1)
    assert extra == {"a": [1]}
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
