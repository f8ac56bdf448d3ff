"""What the processes of test_distributed.py merge, and the same on one process."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import torch_ext
from nets.tiny_net import TinyNet, images, prepared
from snapshots import same, snapshot
from torch_ext import (
    FakeQuantize,
    calibrate,
    get_default_calib_qconfig,
    reset_statistics,
    set_fake_quantize,
    sync_observers,
)

CONFIG = get_default_calib_qconfig(weight_observer="percentile")
BATCHES = 7
PIECES = 20

Values = dict[str, Any]


def plain(model: nn.Module) -> Values:
    """Everything a model holds, as arrays that a pipe takes."""
    found = snapshot(model)
    return {k: v.cpu().numpy() if isinstance(v, Tensor) else v for k, v in found.items()}


def bank(channels: int = 3) -> nn.ModuleDict:
    """Quantizers of every kind of statistic, in CALIBRATION."""
    per_channel = {"ch_axis": 0, "channel_len": channels}
    symmetric, affine = (f"per_channel_{kind}" for kind in ("symmetric", "affine"))
    made = nn.ModuleDict(
        {
            "histogram": FakeQuantize(observer="percentile"),
            "narrow": FakeQuantize(observer="kl", mantissa_bits=5, octaves=6),
            "extrema": FakeQuantize(observer="min_max"),
            "kept": FakeQuantize(observer="clip", histogram=True, octaves=32),
            "channels": FakeQuantize(observer="mse", qscheme=symmetric, **per_channel),
            "channel_extrema": FakeQuantize(observer="min_max", qscheme=affine, **per_channel),
            "given": FakeQuantize(observer="fixed_scale", scale=0.5),
            "weight": FakeQuantize(observer="mse", transient=True),
        }
    )
    set_fake_quantize(made, "calibration")
    return made


def pieces(kind: str) -> list[Tensor]:
    """Data [3, n] of ``PIECES`` sizes and magnitudes; ``kind`` "subnormal" has nothing larger."""
    random = np.random.default_rng([*map(ord, kind)])
    made = []
    for i in range(PIECES):
        if kind == "subnormal":
            bits = random.integers(0, 2**10, (3, 5 + i), dtype=np.int32) + 2 ** (i + 2)
            sign = random.integers(0, 2, bits.shape, dtype=np.int32) << 31
            made.append(torch.from_numpy(bits | sign).view(torch.float32))
            continue
        values = random.standard_normal((3, 40 + 31 * i)) * 2.0 ** random.integers(-30, 12)
        values *= np.exp2(random.uniform(-12, 1, values.shape))
        values[random.random(values.shape) < 0.1] = random.choice([0.0, -0.0])
        if i % 3 == 0:
            where = random.integers(0, values.shape[1], 4)
            values[i % 2, where] = [np.nan, np.inf, -np.inf, 1e-42]
        if i % 4 == 1:
            values[2] = np.nan  # a channel that sees nothing here
        made.append(torch.from_numpy(values).float())
    return made


def dealt(kind: str, world: int) -> list[int]:
    """The rank of each piece."""
    random = np.random.default_rng(world)
    if kind == "all to the last":
        return [world - 1] * PIECES
    if kind == "uneven":  # the first rank has most, some have none
        return [int(world * u**3) for u in random.random(PIECES)]
    return random.integers(0, world, PIECES).tolist()


DEALS = ("even", "uneven", "all to the last", "subnormal")


def fill(filled: nn.ModuleDict, data: list[Tensor]) -> nn.ModuleDict:
    for x in data:
        for quantizer in filled.values():
            quantizer(x)
    return filled


def merge_on(rank: int, world: int, device: str) -> dict[str, Values]:
    """Statistics of the bank for every deal, on a device or on a GPU for each rank."""
    found = {}
    place = torch.device(device)
    if place.type == "cuda" and torch.cuda.device_count() >= world:
        place = torch.device("cuda", rank)
    for kind in DEALS:
        filled = bank().to(place)
        own = [x for x, to in zip(pieces(kind), dealt(kind, world), strict=True) if to == rank]
        fill(filled, [x.to(place) for x in own])
        sync_observers(filled)
        assert {buffer.device for buffer in filled.buffers()} == {place}
        found[kind] = plain(filled)
    return found


def batches() -> list[Tensor]:
    return [images(3 + i % 2, seed=i) for i in range(BATCHES)]


def calibrated_on(data: list[Tensor]) -> TinyNet:
    """In CALIBRATION still."""
    net = prepared(CONFIG)
    if data:
        calibrate(net, data, state="calibration")
    else:
        set_fake_quantize(net, "calibration")
    return net


def merge(rank: int, world: int) -> dict[str, Values]:
    """Statistics of the bank for every deal, and a solved net."""
    found = {}
    for kind in DEALS:
        own = [x for x, to in zip(pieces(kind), dealt(kind, world), strict=True) if to == rank]
        filled = fill(bank(), own)
        # The processor may take subnormals for zeros: no result may depend on it.
        torch.set_flush_denormal(kind == "subnormal")
        sync_observers(filled)
        torch.set_flush_denormal(False)
        found[kind] = plain(filled)
    net = calibrated_on([x for i, x in enumerate(batches()) if i * i % world == rank])
    sync_observers(net)
    set_fake_quantize(net, "validation")
    found["net"] = plain(net)
    return found


def count_collectives(rank: int, world: int) -> dict[str, list[str]]:
    """The reductions of one call, by model."""
    calls: list[str] = []
    reduce = dist.all_reduce

    def counted(tensor: Tensor, op: Any, group: Any) -> None:
        few = f" of {tensor.numel()}" if tensor.numel() < 4 else ""
        calls.append(f"{str(op).split('.')[-1]} {str(tensor.dtype).split('.')[-1]}{few}")
        reduce(tensor, op, group)

    dist.all_reduce = counted
    weights_only = torch_ext.QConfig(None, CONFIG.weight)
    following = prepared(CONFIG)
    set_fake_quantize(following, "qat")
    models = {
        "bank": fill(bank(), pieces("even")[rank : rank + 1]),
        "net": calibrated_on(batches()[rank : rank + 1]),
        "weights only": prepared(weights_only),
        "training": following,
    }
    found = {}
    for name, model in models.items():
        calls.clear()
        sync_observers(model)
        found[name] = list(calls)
    return found


def subgroup(rank: int, world: int) -> tuple[Values, str]:
    """Ranks 0 and 2 merge, rank 1 is no member."""
    group = dist.new_group([0, 2])
    net = calibrated_on(batches()[rank::world])
    before, text = snapshot(net), ""
    try:
        sync_observers(net, group)
    except ValueError as error:
        text = str(error)
        assert same(snapshot(net), before)
    return plain(net), text


def begin_anew(rank: int, world: int) -> list[Values]:
    """Three rounds of data and a sync, with three ways to begin anew."""
    net = prepared(CONFIG)
    rounds = []
    for turn in range(3):
        own = batches()[turn::3][rank::world]
        if turn == 1:
            reset_statistics(net)
        if turn < 2:
            for x in own:
                net(x) if turn else calibrate(net, [x], state="calibration", fresh=False)
            set_fake_quantize(net, "calibration")
        else:
            _fail_to_calibrate(net)
            calibrate(net, own, state="calibration") if own else reset_statistics(net)
        sync_observers(net)
        rounds.append(plain(net))
    return rounds


def _fail_to_calibrate(net: TinyNet) -> None:
    """A refused calibration leaves the statistic, and that it is synchronised."""
    before = snapshot(net)
    for attempt in (lambda: calibrate(net, []), lambda: sync_observers(net)):
        try:
            attempt()
        except (ValueError, RuntimeError):
            assert same(snapshot(net), before)
        else:
            raise AssertionError("expected a refusal")
