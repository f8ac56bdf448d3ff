"""calibrate: what it observes, what it leaves alone, its summary, its checkpoints."""

from __future__ import annotations

import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import torch_ext
from nets.tiny_net import ACTIVATIONS, WEIGHTS, TinyNet, calibrated, images, prepared
from snapshots import same, snapshot
from torch_ext import (
    FakeQuantState,
    calibrate,
    fake_quantize_states,
    get_default_calib_qconfig,
    get_default_qconfig,
    named_quantizers,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIG = get_default_calib_qconfig(weight_observer="percentile")


def fresh() -> TinyNet:
    return prepared(CONFIG)


def batches(count: int = 6) -> list[Tensor]:
    return [images(3 + i % 2, seed=i) for i in range(count)]


def by_hand(data: list[Tensor]) -> TinyNet:
    net = fresh()
    set_fake_quantize(net, "calibration")
    with torch.no_grad():
        for batch in data:
            net(batch)
    set_fake_quantize(net, "validation")
    return net


def test_it_is_what_the_steps_by_hand_are() -> None:
    net = fresh()
    summary = calibrate(net, batches())
    assert same(snapshot(net), snapshot(by_hand(batches())))
    assert (summary.batches, summary.samples, summary.resumed_from) == (6, 21, 0)
    assert summary.unobserved == ()
    assert set(summary.quantizers) == {*ACTIVATIONS, *WEIGHTS}
    seen = summary.quantizers["conv1.input_quantizers.input"]
    whole = torch.cat(batches())
    assert (seen.finite, seen.zeros, seen.infinite, seen.nan) == (whole.numel(), 0, 0, 0)
    assert (seen.minimum, seen.maximum) == (float(whole.min()), float(whole.max()))
    assert "6 batches, 21 samples" in str(summary)
    assert "fc.input_quantizers.input" in str(summary)


@pytest.mark.parametrize("training", [True, False])
def test_modes_norms_gradients_and_random_state_stay(training: bool) -> None:
    net = fresh().train(training)
    net.dropout.train(not training)
    plain = {k: v for k, v in snapshot(net).items() if "quantizer" not in k and ".0." not in k}
    state = torch.get_rng_state()
    loader = DataLoader(TensorDataset(images(12)), batch_size=4, shuffle=True)
    calibrate(net, loader)
    assert torch.equal(torch.get_rng_state(), state)
    after = snapshot(net)
    assert same({key: after[key] for key in plain}, plain)
    assert all(parameter.grad is None for parameter in net.parameters())
    # dropout was off, so the last layer's input was not doubled
    want = by_hand(list(images(12).split(4)))
    assert torch.equal(
        net.fc.input_quantizers.input.observer.extrema,
        want.fc.input_quantizers.input.observer.extrema,
    )


def test_batches_of_every_kind() -> None:
    data = batches(2)
    want = snapshot(by_hand(data))
    pairs = [(x, torch.zeros(len(x))) for x in data]
    named = [{"x": x} for x in data]
    own = [{"picture": x, "id": 7} for x in data]
    for loader in (data, iter(data), pairs, [list(p) for p in pairs], named):
        net = fresh()
        assert calibrate(net, loader).samples == 7
        assert same(snapshot(net), want)
    net = fresh()
    summary = calibrate(net, own, forward=lambda model, batch: model(batch["picture"]))
    assert summary.samples == 7
    assert same(snapshot(net), want)


def test_limit() -> None:
    net = fresh()
    drawn = []

    def loader() -> Iterator[Tensor]:
        for batch in batches():
            drawn.append(batch)
            yield batch

    assert calibrate(net, loader(), limit=2).batches == 2
    assert len(drawn) == 2
    assert same(snapshot(net), snapshot(by_hand(batches(2))))


def test_again_is_anew_unless_asked_to_go_on() -> None:
    net = fresh()
    calibrate(net, batches(2))
    calibrate(net, batches(4))
    assert same(snapshot(net), snapshot(by_hand(batches(4))))
    calibrate(net, batches(6)[4:], fresh=False)
    assert same(snapshot(net), snapshot(by_hand(batches(6))))


@pytest.mark.parametrize("state", FakeQuantState)
def test_the_state_to_leave_in(state: FakeQuantState) -> None:
    net = fresh()
    calibrate(net, batches(2), state=state)
    assert set(fake_quantize_states(net).values()) == {state}
    solved = {bool(q.solved) for q in named_quantizers(net).values()}
    assert solved == {state is not FakeQuantState.CALIBRATION}


def test_autocast() -> None:
    kinds = []
    net = fresh()
    net.fc.register_forward_pre_hook(lambda m, args: kinds.append(net.conv1(images(1)).dtype))
    calibrate(net, batches(1), autocast=torch.bfloat16)
    calibrate(net, batches(1), autocast=True)
    calibrate(net, batches(1))
    assert kinds == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_the_bar_is_silent_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    calibrate(fresh(), batches(2))
    assert capsys.readouterr() == ("", "")
    calibrate(fresh(), batches(2), progress=True)
    assert "2/2" in capsys.readouterr().err


def test_unobserved_quantizers() -> None:
    class Half(TinyNet):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv1(x)
            return out

    def made() -> nn.Module:
        net = Half()
        net.qconfig = CONFIG  # type: ignore[assignment]
        return torch_ext.prepare_qat(net)

    net = made()
    before = snapshot(net)
    with pytest.raises(RuntimeError, match=r"got none for conv2\.input_quantizers\.input"):
        calibrate(net, batches(1))
    assert same(snapshot(net), before)
    summary = calibrate(net, batches(1), allow_unobserved=True)
    assert set(summary.unobserved) == set(ACTIVATIONS[1:])
    assert "saw no data: conv2.input_quantizers.input" in str(summary)


def test_a_forward_that_writes_to_the_model_is_reported() -> None:
    class Counting(TinyNet):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    net = Counting()
    net.qconfig = CONFIG  # type: ignore[assignment]
    net = torch_ext.prepare_qat(net)
    with pytest.warns(UserWarning, match="forward changed calls although in eval mode"):
        calibrate(net, batches(1))


class Broken(Exception):
    pass


def failing(after: int, data: list[Tensor]) -> Iterator[Tensor]:
    yield from data[:after]
    raise Broken


@pytest.mark.parametrize("before", ["float", "validation"])
def test_a_failure_changes_nothing(before: str) -> None:
    net = calibrated(CONFIG) if before == "validation" else fresh()
    net.train()
    start, state = snapshot(net), torch.get_rng_state()
    with pytest.raises(Broken):
        calibrate(net, failing(3, batches()))
    assert same(snapshot(net), start)
    net.fc.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        calibrate(net, batches())
    assert same(snapshot(net), start)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"limit": 0}, ValueError, "limit to be 1 or more, got 0"),
        ({"limit": 2.0}, TypeError, "limit to be a number of batches, got 2.0"),
        ({"every": -1}, ValueError, "every to be 1 or more, got -1"),
        ({"state": "done"}, ValueError, "unknown state 'done'"),
        ({"loader": []}, ValueError, "the loader to give batches, got none"),
        ({"loader": [()]}, ValueError, "batches to hold inputs, got an empty one"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    net = fresh()
    before = snapshot(net)
    with pytest.raises(kind) as caught:
        calibrate(net, **({"loader": batches(1)} | arguments))
    assert text in str(caught.value)
    assert same(snapshot(net), before)


class TestCheckpoints:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "calibration.safetensors"

    @pytest.mark.parametrize("interrupted_after", range(7))
    @pytest.mark.parametrize("every", [1, 2, 4])
    def test_an_interrupted_calibration_goes_on_bit_for_bit(
        self, path: Path, interrupted_after: int, every: int
    ) -> None:
        want = snapshot(by_hand(batches()))
        keys: dict[str, Any] = {"checkpoint": path, "every": every}
        with pytest.raises(Broken):
            calibrate(fresh(), failing(interrupted_after, batches()), **keys)
        kept = interrupted_after - interrupted_after % every
        assert path.exists() == (kept > 0)
        net = fresh()  # another process
        summary = calibrate(net, batches(), **keys)
        assert (summary.resumed_from, summary.batches, summary.samples) == (kept, 6, 21)
        assert same(snapshot(net), want)
        assert not path.exists()

    def test_several_interruptions(self, path: Path) -> None:
        net = fresh()
        keys: dict[str, Any] = {"checkpoint": path, "every": 1}
        for after in (2, 2, 3, 5):
            with pytest.raises(Broken):
                calibrate(net, failing(after, batches()), **keys)
        assert calibrate(net, batches(), **keys).resumed_from == 5
        assert same(snapshot(net), snapshot(by_hand(batches())))

    def test_a_killed_process_loses_nothing_but_its_last_batch(self, path: Path) -> None:
        script = f"""
import os, signal, sys
sys.path[:] = {sys.path!r}
import test_calibrate as t

def loader():
    yield from t.batches()[:4]
    os.kill(os.getpid(), signal.SIGKILL)

t.calibrate(t.fresh(), loader(), checkpoint={str(path)!r}, every=1)
"""
        done = subprocess.run([sys.executable, "-c", script], timeout=300)
        assert done.returncode == -signal.SIGKILL
        net = fresh()
        assert calibrate(net, batches(), checkpoint=path, every=1).resumed_from == 4
        assert same(snapshot(net), snapshot(by_hand(batches())))

    def test_skipped_batches_are_not_run(self, path: Path) -> None:
        keys: dict[str, Any] = {"checkpoint": path, "every": 2}
        with pytest.raises(Broken):
            calibrate(fresh(), failing(4, batches()), **keys)
        net, calls = fresh(), []
        net.fc.register_forward_pre_hook(lambda *_: calls.append(1))
        calibrate(net, batches(), **keys)
        assert len(calls) == 2

    def test_shuffling_loaders_give_the_same_order_again(self, path: Path) -> None:
        def loader() -> DataLoader[Any]:
            return DataLoader(TensorDataset(images(24)), batch_size=4, shuffle=True)

        keys: dict[str, Any] = {"checkpoint": path, "every": 1}
        torch.manual_seed(11)
        whole = fresh()
        calibrate(whole, loader())
        net = fresh()
        torch.manual_seed(11)
        net.fc.register_forward_pre_hook(lambda *_: 1 / 0 if path.exists() else None)
        with pytest.raises(ZeroDivisionError):
            calibrate(net, loader(), **keys)
        torch.manual_seed(12)
        net = fresh()
        assert calibrate(net, loader(), **keys).resumed_from == 1
        assert same(snapshot(net), snapshot(whole))

    def test_other_data_is_noticed(self, path: Path) -> None:
        keys: dict[str, Any] = {"checkpoint": path, "every": 2}
        with pytest.raises(Broken):
            calibrate(fresh(), failing(4, batches()), **keys)
        net = fresh()
        before, held = snapshot(net), path.read_bytes()
        other = [*batches(3), images(4, seed=99), *batches()[4:]]
        with pytest.raises(ValueError, match="expected batch 4 to be the one of the checkpoint"):
            calibrate(net, other, **keys)
        with pytest.raises(ValueError, match="to give at least the 4 batches of the checkpoint"):
            calibrate(net, batches(3), **keys)
        assert same(snapshot(net), before)
        assert path.read_bytes() == held

    @pytest.mark.parametrize(
        ("net", "text"),
        [
            (
                lambda: prepared(get_default_qconfig()),
                "conv1.input_quantizers.input.observer: expected",
            ),
            (
                lambda: prepared(
                    get_default_calib_qconfig(
                        weight_observer="percentile", activation_qkwargs={"percentile": 99.0}
                    )
                ),
                "options: expected {'percentile': 99.0}, got {'percentile': 99.99}",
            ),
            (lambda: prepared(CONFIG, mapping={"fc": None}), "of another model: differs in fc.inp"),
        ],
    )
    def test_other_models_are_refused(self, path: Path, net: Any, text: str) -> None:
        keys: dict[str, Any] = {"checkpoint": path, "every": 2}
        with pytest.raises(Broken):
            calibrate(fresh(), failing(4, batches()), **keys)
        other = net()
        before, held = snapshot(other), path.read_bytes()
        with pytest.raises(ValueError, match=str(path)) as caught:
            calibrate(other, batches(), **keys)
        assert text in str(caught.value)
        assert same(snapshot(other), before)
        assert path.read_bytes() == held

    def test_damaged_files_are_refused(self, path: Path) -> None:
        keys: dict[str, Any] = {"checkpoint": path, "every": 2}
        with pytest.raises(Broken):
            calibrate(fresh(), failing(2, batches()), **keys)
        whole = path.read_bytes()
        (length,) = struct.unpack("<Q", whole[:8])
        # the first count of a histogram: more values than the tally says
        more = whole[: 8 + length] + b"\x05" + whole[9 + length :]
        description = whole.replace(b'\\"batches\\": 2', b'\\"batches\\":-2')
        samples = whole.replace(b'\\"samples\\": 7', b'\\"samples\\":[]', 1)
        net = fresh()
        before = snapshot(net)
        for damaged, text in [
            (whole[:-1], "truncated"),
            (whole[:8], "truncated"),
            (more, "observer.counts: expected values to be as many as the tally"),
            (description, "batches: expected a count, got -2"),
            (samples, "samples: expected a count, got []"),
            (whole.replace(b"rng_state", b"rng_st4te"), "rng_state: expected"),
        ]:
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=str(path)) as caught:
                calibrate(net, batches(), **keys)
            assert text in str(caught.value)
            assert same(snapshot(net), before)

    def test_a_parameter_file_is_no_checkpoint(self, path: Path) -> None:
        torch_ext.save_observer_params(calibrated(CONFIG), path)
        with pytest.raises(ValueError, match="kind: expected 'calibration', got 'observer_params'"):
            calibrate(fresh(), batches(), checkpoint=path)
