"""sensitivity(bits=...): each quantizer alone at other widths, against nets calibrated for them."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from bit_nets import DATA, learned, output_error
from nets.tiny_net import ACTIVATIONS, WEIGHTS, TinyNet, calibrated
from snapshots import same, snapshot
from torch_ext import get_default_qconfig, sensitivity, set_fake_quantize

pytestmark = pytest.mark.usefixtures("one_thread")

BITS = (3, 6, 16)


def net_of(bits: int = 8) -> TinyNet:
    keys = {"dtype": f"int{bits}"}
    return calibrated(
        get_default_qconfig(
            activation_observer="percentile", activation_qkwargs=keys, weight_qkwargs=keys
        )
    )


def test_as_nets_calibrated_with_so_many() -> None:
    found = sensitivity(net_of(), DATA, bits=(16, 3, 6, 3))
    assert (found.bits, found.ways) == (BITS, ())
    assert {row.name for row in found.rows} == {*ACTIVATIONS, *WEIGHTS}
    for bits in BITS:
        net = net_of(bits)
        for row in found.rows:
            set_fake_quantize(net, "float")
            set_fake_quantize(net, "validation", pattern=row.name)
            want = pytest.approx(output_error(net), rel=1e-9)
            assert row.losses[bits] == want, (row.name, bits)
            assert math.isnan(row.on)
            assert math.isnan(row.gain)
    order = [row.losses[3] for row in found.rows]
    assert order == sorted(order, reverse=True)
    header = str(found).splitlines()[1].split("  ")
    assert [title.strip() for title in header if title][-3:] == [
        f"loss, {bits} bits" for bits in BITS
    ]


def test_beside_the_ways_and_by_a_metric() -> None:
    def minus_error(model: nn.Module, data: Any) -> float:
        return -output_error(model)

    both = sensitivity(net_of(), None, minus_error, ways=["on", "off"], bits=4, pattern="fc.*")
    plain = sensitivity(net_of(), DATA, pattern="fc.*")
    bits = sensitivity(net_of(), DATA, bits=4, pattern="fc.*")
    for row in both.rows:
        same_row = next(other for other in plain.rows if other.name == row.name)
        assert (row.loss, row.gain) == pytest.approx((same_row.loss, same_row.gain))
        assert row.losses == pytest.approx(
            next(other.losses for other in bits.rows if other.name == row.name)
        )


def test_its_own_width_is_the_quantizer_as_it_is() -> None:
    found = sensitivity(net_of(), DATA, ways="on", bits=8)
    assert all(row.losses[8] == row.loss for row in found.rows)


def test_a_picture_of_many_widths(tmp_path: Path) -> None:
    found = sensitivity(net_of(), DATA, ways="on", bits=range(2, 14), pattern="fc.*")
    found.save_picture(tmp_path / "bits.svg")
    root = ElementTree.parse(tmp_path / "bits.svg").getroot()
    texts = {entry.text for entry in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {"loss with it alone", "loss, 2 bits", "loss, 13 bits"} <= texts


@pytest.mark.parametrize("state", ["calibration", "qat", "validation", "float"])
def test_the_model_stays_as_it_was(state: str) -> None:
    net = net_of()
    set_fake_quantize(net, state)
    before = snapshot(net)
    sensitivity(net, DATA, bits=(4, 16))
    calls = 0

    def forward(model: nn.Module, batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise InterruptedError
        return model(batch)

    with pytest.raises(InterruptedError):
        sensitivity(net, DATA, bits=(4, 16), forward=forward)
    assert same(snapshot(net), before)


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path, calls, fails_at = tmp_path / "numbers.json", 0, 2 * 6 + 1

    def forward(model: nn.Module, batch: Tensor) -> Any:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            raise InterruptedError
        return model(batch)

    with pytest.raises(InterruptedError):
        sensitivity(net_of(), DATA, bits=BITS, forward=forward, checkpoint=path)
    calls, fails_at = 0, -1
    found = sensitivity(net_of(), DATA, bits=BITS, forward=forward, checkpoint=path)
    assert calls == 2 * (2 + 3 * 8 - 5)
    whole = sensitivity(net_of(), DATA, bits=BITS)
    assert [row.losses for row in found.rows] == [row.losses for row in whole.rows]


@pytest.mark.parametrize(
    ("keys", "kind", "text"),
    [
        ({"bits": ()}, ValueError, "sensitivity: expected bits to be integers, got none"),
        ({"bits": 1}, ValueError, "sensitivity: expected bits to be between 2 and 16, got 1"),
        ({"bits": "8"}, TypeError, "sensitivity: expected bits to be integers, got '8'"),
        ({"bits": (8, 4.0)}, TypeError, "sensitivity: expected bits to be an integer, got 4.0"),
        ({"bits": 8.0}, TypeError, "sensitivity: expected bits to be integers, got 8.0"),
    ],
)
def test_bad_widths(keys: dict[str, Any], kind: type[Exception], text: str) -> None:
    net = net_of()
    before = snapshot(net)
    with pytest.raises(kind) as caught:
        sensitivity(net, DATA, **keys)
    assert text in str(caught.value)
    assert same(snapshot(net), before)


def test_learned_ranges_have_one_width() -> None:
    net = learned()
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"\n  conv1\.\S+: it learns its range \(lsq\)"):
        sensitivity(net, DATA, bits=(4, 8))
    assert same(snapshot(net), before)
    assert len(sensitivity(net, DATA, bits=8).rows) == len([*ACTIVATIONS, *WEIGHTS])
