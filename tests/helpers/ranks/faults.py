"""Misuse and deaths of test_distributed.py."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from nets.tiny_net import TinyNet, images, prepared
from ranks.jobs import CONFIG, Values, bank, batches, calibrated_on, plain
from snapshots import same, snapshot
from torch_ext import (
    calibrate,
    get_default_calib_qconfig,
    reset_statistics,
    save_observer_params,
    set_fake_quantize,
    sync_observers,
)


def observing(net: TinyNet, data: list[Tensor]) -> TinyNet:
    """In CALIBRATION."""
    set_fake_quantize(net, "calibration")
    for x in data:
        net(x)
    return net


def _other_model(rank: int, case: str) -> Any:
    """What a rank calls `sync_observers` with in a case of misuse."""
    odd = rank == 1
    if case == "names":
        net = prepared(CONFIG, mapping={"fc": None} if odd else None)
        return observing(net, batches()[rank : rank + 1])
    if case in ("shapes", "rules", "options"):
        other = {
            "shapes": get_default_calib_qconfig(activation_qkwargs={"mantissa_bits": 8}),
            "rules": get_default_calib_qconfig(activation_observer="kl"),
            "options": get_default_calib_qconfig(activation_qkwargs={"percentile": 99.0}),
        }[case]
        net = prepared(other if odd else get_default_calib_qconfig())
        return observing(net, batches()[rank : rank + 1])
    if case == "channels":
        return bank(4 if odd else 3)
    if case == "no quantizers":
        return nn.Linear(2, 2) if odd else calibrated_on(batches()[:1])
    if case == "no module":
        return 3 if odd else calibrated_on(batches()[:1])
    net = calibrated_on(batches()[rank : rank + 1])
    if case == "state" and odd:
        set_fake_quantize(net, "qat", "conv1.input_quantizers.input")
    if case == "all solved":
        set_fake_quantize(net, "validation")
    if case in ("twice", "twice on one rank", "twice with more data"):
        sync_observers(net)
    if case == "twice on one rank" and not odd:
        reset_statistics(net)
    if case == "twice with more data":
        net(images(2))
    if case == "statistics broadcast":
        return DistributedDataParallel(net)
    return net


MISUSE = (
    "names", "shapes", "rules", "options", "channels", "no quantizers", "no module", "state",
    "all solved", "twice", "twice on one rank", "twice with more data", "statistics broadcast",
    "no group",
)  # fmt: skip


def misuse(rank: int, world: int) -> dict[str, tuple[str, str]]:
    """Kind and text of the error of each case; asserts that nothing was changed."""
    found = {}
    for case in MISUSE:
        model = _other_model(rank, case)
        before = snapshot(model) if isinstance(model, nn.Module) else {}
        try:
            sync_observers(model, "gloo" if case == "no group" else None)  # type: ignore[arg-type]
            found[case] = ("", "")
        except (ValueError, TypeError, RuntimeError) as error:
            found[case] = (type(error).__name__, str(error))
        assert not isinstance(model, nn.Module) or same(snapshot(model), before), case
    net = calibrated_on(batches()[rank::world])
    sync_observers(net)  # the group serves still
    set_fake_quantize(net, "validation")
    whole = calibrated_on(batches())
    set_fake_quantize(whole, "validation")
    assert same(snapshot(net), snapshot(whole))
    return found


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def one_is_missing(rank: int, world: int, how: str, path: str) -> tuple[str, float, bool]:
    """Rank 1 dies or sleeps, or dies before its last collective: the others' error, and how long
    they waited."""
    net = calibrated_on(batches()[rank::world])
    if how == "killed at the very last":
        set_fake_quantize(net, "qat", "conv1.input_quantizers.input")
    if rank == 0:
        solved = calibrated_on(batches())
        set_fake_quantize(solved, "validation")
        save_observer_params(solved, path)
    dist.barrier()
    if rank == 1:
        if how == "asleep":
            time.sleep(600)
        if how == "killed":
            die()
        calls, reduce = [], dist.all_reduce

        def dying(*arguments: Any) -> None:
            calls.append(1)
            die() if len(calls) == (3 if how.endswith("SUM") else 4) else reduce(*arguments)

        dist.all_reduce = dying
    before, begun = snapshot(net), time.monotonic()
    try:
        sync_observers(net)
        text = ""
    except RuntimeError as error:
        text = str(error)
    waited = time.monotonic() - begun
    unchanged = same(snapshot(net), before)
    if not text and rank == 0:
        set_fake_quantize(net, "validation")
        save_observer_params(net, path)
    return text, waited, unchanged


def calibrate_with_checkpoints(rank: int, world: int, folder: str, killed: bool) -> Values | str:
    """Each rank keeps a checkpoint; with ``killed`` rank 1 dies after two of its batches."""
    own = batches()[rank::world]

    def loader() -> Iterator[Tensor]:
        for i, x in enumerate(own):
            if killed and rank == 1 and i == 2:
                die()
            yield x

    net = prepared(CONFIG)
    path = Path(folder) / f"rank{rank}.safetensors"
    summary = calibrate(net, loader(), checkpoint=path, every=1, state="calibration")
    assert summary.resumed_from == (2 if rank == 1 else 0)
    try:
        sync_observers(net)
    except RuntimeError as error:
        return str(error)
    set_fake_quantize(net, "validation")
    if rank == 0:
        save_observer_params(net, Path(folder) / "params.safetensors")
    return plain(net)
