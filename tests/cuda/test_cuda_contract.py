"""Bad input: the same contracts in the same words as on the CPU; bad values become NaN."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from devices import assert_same_bits, no_sync, to
from hostile_batches import broken_states
from op_clauses import CLAUSES, INF, NAN
from op_samples import SAMPLES, Arguments
from sample_data import sample
from statistic_tensors import observed
from torch_ext import ops

NATIVE = torch.ops.torch_ext

# Clauses about values: looking at them would be a wait, so on a CUDA device they are not refused.
BY_VALUE = {
    *("scale zero", "scale negative", "scale NaN", "scale infinite", "zero_point off grid"),
    *("range upside down", "range NaN", "range infinite"),
    *("negative count", "width zero", "width NaN", "width infinite"),
}


# Refused on the CPU because the sample's zero points are not on such a grid.
ZERO_POINT_OFF = {"grid without 0 above", "grid without 0 below"}


def is_by_value(op: str, what: str) -> bool:
    fake_quant = op in ("fake_quant", "_fake_quant_forward")
    return what in BY_VALUE or (fake_quant and what in ZERO_POINT_OFF)


def cases(by_value: bool) -> Iterator[Any]:
    for op, clauses in CLAUSES.items():
        for what, _, wrong in clauses:
            if is_by_value(op, what) == by_value:
                yield pytest.param(op, wrong, id=f"{op}-{what.replace(' ', '_')}")


def refusal(op: str, arguments: Arguments) -> str:
    """The first line of the exception's text."""
    with pytest.raises((RuntimeError, ValueError)) as raised:
        getattr(NATIVE, op)(**arguments)
    return str(raised.value).splitlines()[0]


def in_words_of_the_cpu(text: str, device: torch.device) -> str:
    return text.replace(str(device), "cpu")


@pytest.mark.parametrize(("op", "wrong"), list(cases(by_value=False)))
def test_contract(op: str, wrong: dict[str, Any], device: torch.device):
    want = refusal(op, SAMPLES[op][0]() | wrong)
    arguments = to(SAMPLES[op][0]() | wrong, device)
    before = to(arguments, device)
    assert in_words_of_the_cpu(refusal(op, arguments), device) == want
    assert_same_bits(tensors(arguments), tensors(before), "an argument changed")


def tensors(arguments: Arguments) -> dict[str, Any]:
    return {k: v for k, v in arguments.items() if torch.is_tensor(v) or _is_list(v)}


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and torch.is_tensor(value[0])


# What each such op gives for its first output where a value is bad.
def bad_of(op: str, result: Any) -> Tensor:
    return result if torch.is_tensor(result) else result[0] if op != "kl_threshold" else result[1]


@pytest.mark.parametrize(("op", "wrong"), list(cases(by_value=True)))
def test_bad_value_gives_nan_without_a_wait(op: str, wrong: dict[str, Any], device: torch.device):
    """Where it is bad, and nowhere else."""
    arguments = to(SAMPLES[op][0]() | wrong, device)
    if device.type == "cpu":
        assert "expected" in refusal(op, arguments)
        return
    with no_sync(device):
        result = getattr(NATIVE, op)(**arguments)
    found = bad_of(op, result).isnan()
    assert found.any()
    if op == "kl_threshold":
        assert result[0].tolist() == [-1] * len(found)
        assert found.all()
    elif op == "qparams":
        good = wrong["range"].isfinite().all(1) & (wrong["range"][:, 0] <= wrong["range"][:, 1])
        assert found.tolist() == (~good).tolist()
    else:  # x is [2, 3] without NaN, with the channels on axis 1
        s, z = arguments["scale"].cpu(), arguments["zero_point"].cpu()
        bad = ~(s.isfinite() & (s > 0))
        low, high = json.loads(arguments["grid"])
        bad |= (z < low) | (z > high)
        assert found.cpu().tolist() == [bad.tolist()] * 2


@pytest.mark.sanitizer
@pytest.mark.parametrize("scale", [0.0, -1.0, -0.0, NAN, INF, -INF])
def test_bad_scale_spoils_its_channel_only(scale: float, device: torch.device):
    x = torch.tensor([0.0, 1.0, -1e30, INF, NAN]).repeat(3, 1)
    good, bad = torch.tensor([0.5, 0.5, 0.5]), torch.tensor([0.5, scale, 0.5])
    z = torch.zeros(3, dtype=torch.int32)
    want = ops.fake_quant(x, good, z, -128, 127, 0)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        if device.type == "cpu":
            with pytest.raises(RuntimeError, match="expected scale to be positive and finite"):
                ops.fake_quant(x.to(dtype), bad, z, -128, 127, 0)
            continue
        tensors = (x.to(dtype).to(device), bad.to(device), z.to(device))
        have = ops.fake_quant(*tensors, -128, 127, 0)
        assert have[1].isnan().all(), dtype
        assert_same_bits(have[::2].float(), want[::2], dtype)
        assert_same_bits(NATIVE._fake_quant_forward(*tensors, "[-128,127]", 0)[0], have, dtype)


@pytest.mark.parametrize("zero_point", [-129, 128, 2**31 - 1, -(2**31)])
def test_zero_point_off_the_grid(zero_point: int, device: torch.device):
    x = torch.linspace(-200, 200, 99)
    s, z = torch.ones(1), torch.tensor([zero_point], dtype=torch.int32)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="expected zero_point to be between"):
            ops.fake_quant(x, s, z, -128, 127)
        return
    assert ops.fake_quant(x.to(device), s.to(device), z.to(device), -128, 127).isnan().all()


@pytest.mark.parametrize("pair", [(NAN, 1.0), (0.0, NAN), (0.0, INF), (-INF, 0.0), (1.0, 0.5)])
@pytest.mark.parametrize("grid", [(-128, 127, True), (0, 255, True), (0, 255, False)], ids=str)
def test_invalid_range(grid: Any, pair: tuple[float, float], device: torch.device):
    values = torch.tensor([[-1.0, 2.0], pair, [0.0, 0.0]])
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="expected range to be finite and in order"):
            ops.qparams(values, *grid)
        return
    scale, zero_point = ops.qparams(values.to(device), *grid)
    want = ops.qparams(values[::2].contiguous(), *grid)
    assert scale[1].isnan()
    assert_same_bits([scale[::2], zero_point[::2]], list(want))


@pytest.mark.parametrize("damage", list(broken_states()))
@pytest.mark.parametrize("rule", torch_ext.observers())
def test_damaged_statistics(rule: str, damage: str, device: torch.device):
    """What the CPU refuses is NaN; what it solves has its bits."""
    state = broken_states()[damage]
    for symmetric in (True, False):
        grid = (-128, 127, symmetric)
        try:
            want = ops.solve(rule, *state, *grid)
        except (RuntimeError, ValueError):
            want = torch.full((1, 2), NAN)
            if device.type == "cpu":
                continue
        with_others = ops.solve_many(
            [rule] * 2,
            *([getattr(s, part) for s in _beside_a_sound_one(state, device)] for part in PARTS),
            [-128] * 2,
            [127] * 2,
            [symmetric] * 2,
        )
        assert_same_bits(with_others[0][1], want, symmetric)
        assert with_others[0][0].isfinite().all()
        assert bool(with_others[1][1].isnan().all()) == bool(want.isnan().all())


PARTS = ("extrema", "tally", "counts")


def _beside_a_sound_one(state: Any, device: torch.device) -> list[Any]:
    return [observed(sample("gauss", 100).to(device)), state.to(device)]


@pytest.mark.parametrize("count", [-1, 2**53 + 1, 2**62, 2**63 - 1, -(2**63)])
@pytest.mark.parametrize("where", [0, 77, 255])
def test_bad_counts_of_a_linear_histogram(where: int, count: int, device: torch.device):
    counts = torch.arange(3 * 256).reshape(3, 256) % 97
    counts[1, where] = count
    width = torch.ones(3, dtype=torch.float64)
    if device.type == "cpu":
        with pytest.raises(RuntimeError, match="expected counts to be"):
            ops.kl_threshold(counts, width)
        return
    for variant in ("slides", "ncnn", "tvm"):
        index, threshold = ops.kl_threshold(counts.to(device), width.to(device), 128, variant)
        want = ops.kl_threshold(counts[::2], width[:2], 128, variant)
        assert index[1] == -1
        assert threshold[1].isnan()
        assert_same_bits([index[::2], threshold[::2]], list(want), variant)


def device_cases() -> Iterator[Any]:
    for op, makes in SAMPLES.items():
        arguments = makes[0]()
        names = [n for n, v in arguments.items() if torch.is_tensor(v)]
        for name in names if len(names) > 1 else []:
            yield pytest.param(op, name, id=f"{op}-{name}")


@pytest.mark.parametrize(("op", "name"), list(device_cases()))
def test_tensors_of_two_devices(op: str, name: str, device: torch.device):
    """One on the CPU among others on the device, and the other way round."""
    here: torch.device | str = "cpu" if device.type == "cuda" else "meta"
    public = {"_fake_quant_forward": "fake_quant"}.get(op, op)
    for most, one in ((device, here), (here, device)):
        arguments = to(SAMPLES[op][0](), most)
        arguments[name] = SAMPLES[op][0]()[name].to(one)
        text = refusal(op, arguments)
        assert text.startswith(f"{public}: expected "), text
        assert str(device) in text or "meta" in text, text


def test_list_of_statistics_on_two_devices(device: torch.device):
    other = "cpu" if device.type == "cuda" else "meta"
    for part in PARTS:
        arguments = to(SAMPLES["solve_many"][0](), device)
        arguments[part] = [arguments[part][0], arguments[part][1].to(other)]
        assert refusal("solve_many", arguments).startswith("solve_many: expected ")


def test_a_whole_statistic_on_another_device_in_the_list(device: torch.device):
    """Its pointers would be followed on the wrong device."""
    other: torch.device | str = "cpu" if device.type == "cuda" else "meta"
    for first, second in ((device, other), (other, device)):
        arguments = SAMPLES["solve_many"][0]()
        for part in PARTS:
            mine, theirs = arguments[part]
            arguments[part] = [mine.to(first), theirs.to(second)]
        text = refusal("solve_many", arguments)
        assert text.startswith("solve_many: expected "), text
        assert re.search(r"(extrema|tally) to be .*, got ", text), text


def module_calls() -> dict[str, Callable[[Any, Tensor], object]]:
    return {
        "Observer": lambda where, x: torch_ext.Observer("mse").to(where)(x),
        "FakeQuantize": lambda where, x: _training().to(where)(x),
    }


def _training() -> torch_ext.FakeQuantize:
    quantizer = torch_ext.FakeQuantize("fake_quant", "mse")
    quantizer.state = torch_ext.FakeQuantState.QAT
    return quantizer


@pytest.mark.parametrize("name", list(module_calls()))
def test_module_and_data_on_two_devices(name: str, device: torch.device):
    other: torch.device | str = "cpu" if device.type == "cuda" else "meta"
    for where, x in ((device, torch.ones(3, device=other)), (other, torch.ones(3, device=device))):
        with pytest.raises(RuntimeError, match=r"expected .* to be .*, got"):
            module_calls()[name](where, x)
