"""10,000 damaged files: each is refused by name and field, or holds what could have been saved."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from damaged_files import mutated
from torch_ext import FakeQuantize, QuantizationWarning, save_observer_params, set_fake_quantize
from torch_ext.calibration.checkpoint import Progress, read_progress, write_progress
from torch_ext.files.observer_params import read_observer_params
from torch_ext.files.quantizer_params import FIELDS, Params, quantizer_of, spec_of
from torch_ext.quantizers.solve import solve_observers

PARAMS, CHECKPOINTS = 7000, 3000
GENERAL = {
    "header", "description", "data", "kind", "version", "quantizers", "not a file of torch_ext",
}  # fmt: skip


def small() -> nn.ModuleDict:
    """Two quantizers, whose file is short."""
    layout: dict[str, Any] = {"octaves": 4, "mantissa_bits": 5}
    channels = {"qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": 2}
    net = nn.ModuleDict(
        {
            "act": FakeQuantize(observer="percentile", dtype="uint8", **layout),
            "other": FakeQuantize("lsq", "kl", **channels, **layout),
        }
    )
    set_fake_quantize(net, "calibration")
    for name, quantizer in net.items():
        quantizer(torch.randn(2, 50, generator=torch.Generator().manual_seed(len(name))))
    return net


# The fields of a quantizer, and of a tensor's entry in the header.
KEYS = (
    *FIELDS, *spec_of(small()["other"]), "synced", "description", "shape", "dtype", "data_offsets",
    "batches", "samples", "last_digest", "rng_state",
)  # fmt: skip


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def path() -> Iterator[Path]:
    """A file in memory: opening one on a disk takes longer than everything else here."""
    descriptor = os.memfd_create("damaged")
    yield Path(f"/proc/self/fd/{descriptor}")
    os.close(descriptor)


@contextlib.contextmanager
def little_memory(bytes_more: int) -> Iterator[None]:
    """An allocation of more than that fails."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + bytes_more, before[1])
    )
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


EXECUTING = {"exec", "compile", "import", "os.system", "os.exec", "os.posix_spawn", "os.fork"} | {
    "subprocess.Popen", "pickle.find_class", "marshal.loads", "marshal.load", "ctypes.dlopen",
}  # fmt: skip
watching: list[str] = []  # what was executed, once "on" is its first entry


def _audit(event: str, _: Any) -> None:
    if watching and event in EXECUTING:
        watching.append(event)


@contextlib.contextmanager
def executes_nothing() -> Iterator[None]:
    watching.append("on")
    try:
        yield
        assert watching == ["on"]
    finally:
        watching.clear()


def refused_or_read(path: Path, read: Callable[[], Any]) -> Any:
    """What was read, or None after an error that names file and field."""
    try:
        return read()
    except ValueError as error:
        text = str(error)
        assert text.startswith(f"{path}: "), text
        assert text.isprintable()
        assert len(text) < 600
        field = re.split(r": ", text.removeprefix(f"{path}: "))[0]
        named = field in GENERAL or field.endswith(KEYS) or field.encode() in path.read_bytes()
        assert named, text
        return None


def assert_could_have_been_saved(params: dict[str, Params]) -> None:
    quantizers = {name: quantizer_of(own) for name, own in params.items()}
    observers = {name: quantizer.observer for name, quantizer in quantizers.items()}
    observed = {n: o for n, o in observers.items() if bool((o.tally[:, 0] > 0).all())}
    solutions = solve_observers(observed)
    for name, own in params.items():
        scales = [own["scale"], solutions[name].scale] if name in solutions else [own["scale"]]
        for scale in scales:
            assert bool((scale.isfinite() & (scale > 0)).all()), name


def run(path: Path, whole: bytes, seeds: range, read: Callable[[], Any]) -> list[Any]:
    sys.addaudithook(_audit)
    path.write_bytes(whole)
    assert refused_or_read(path, read) is not None  # what is imported late, is
    found = []
    with little_memory(2**29):
        for seed in seeds:
            path.write_bytes(mutated(whole, seed))
            with executes_nothing():
                found.append(refused_or_read(path, read))
    return found


def test_parameter_files(path: Path, tmp_path: Path) -> None:
    net = small()
    with pytest.warns(QuantizationWarning, match="negative values"):
        set_fake_quantize(net, "validation")
    save_observer_params(net, tmp_path / "params")
    whole = (tmp_path / "params").read_bytes()
    found = run(path, whole, range(PARAMS), lambda: read_observer_params(path))
    taken = [params for params in found if params is not None]
    for params in taken:
        assert_could_have_been_saved(params)
    # Numbers and names that nothing contradicts: the damage reaches what lies behind the checks.
    assert PARAMS * 0.005 < len(taken) < PARAMS * 0.3, len(taken)


def test_checkpoints(path: Path, tmp_path: Path) -> None:
    net: Any = small()
    quantizers = dict(net.items())
    progress = Progress(3, 6, "digest", torch.get_rng_state())
    write_progress(tmp_path / "checkpoint", quantizers, progress)
    whole = (tmp_path / "checkpoint").read_bytes()
    read = lambda: read_progress(path, quantizers)  # noqa: E731
    start = {key: value.clone() for key, value in net.state_dict().items()}

    def read_or_unchanged() -> Progress | None:
        try:
            return read()
        except ValueError:
            after = net.state_dict()
            assert all(torch.equal(after[key], value) for key, value in start.items())
            raise

    def read_from_start() -> Progress | None:
        net.load_state_dict(start)
        return read_or_unchanged()

    found = run(path, whole, range(PARAMS, PARAMS + CHECKPOINTS), read_from_start)
    taken = [progress for progress in found if progress is not None]
    assert all(progress.batches >= 0 and progress.samples >= 0 for progress in taken)
    assert CHECKPOINTS * 0.005 < len(taken) < CHECKPOINTS * 0.3, len(taken)
