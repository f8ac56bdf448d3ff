"""sync_observers on 1 to 8 processes, DDP and FSDP2, misuse, and ranks that die."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import torch_ext
from nets.tiny_net import ACTIVATIONS, images, prepared
from ranks import faults, jobs, processes, training
from torch_ext import named_quantizers, set_fake_quantize, sync_observers
from torch_ext.calibration import distributed

pytestmark = pytest.mark.usefixtures("one_thread")


def assert_same(have: jobs.Values, want: jobs.Values, label: object = "") -> None:
    assert have.keys() == want.keys(), label
    for key, value in want.items():
        if isinstance(value, np.ndarray):
            assert have[key].dtype == value.dtype, (label, key)
            assert have[key].tobytes() == value.tobytes(), (label, key, have[key], value)
        else:
            assert have[key] == value, (label, key)


@pytest.fixture(scope="module")
def whole() -> dict[str, jobs.Values]:
    """What one process has that saw all data."""
    torch.set_num_threads(1)
    found = {k: jobs.plain(jobs.fill(jobs.bank(), jobs.pieces(k))) for k in jobs.DEALS}
    return {**found, "net": jobs.plain(solved(jobs.batches()))}


def solved(data: list[torch.Tensor]) -> nn.Module:
    net = jobs.calibrated_on(data)
    set_fake_quantize(net, "validation")
    return net


class TestMerging:
    @pytest.mark.parametrize("world", range(1, 9))
    def test_it_is_the_statistic_of_one_process(
        self, world: int, whole: dict[str, jobs.Values]
    ) -> None:
        for rank, found in enumerate(processes.run(world, jobs.merge)):
            assert found.keys() == whole.keys()
            for kind, values in found.items():
                assert_same(values, whole[kind], (world, rank, kind))

    def test_the_data_put_it_to_the_test(self, whole: dict[str, jobs.Values]) -> None:
        """Every column of the tally is filled, windows move, and ranks stay without data."""
        tally = whole["even"]["histogram.observer.tally"]
        assert (tally > 0).all()
        tops = {
            int(x.nan_to_num(0, 0, 0).abs().max().frexp().exponent) for x in jobs.pieces("even")
        }
        assert max(tops) - min(tops) > 16
        assert any(set(jobs.dealt("uneven", world)) != set(range(world)) for world in range(2, 9))
        largest = np.abs(whole["subnormal"]["extrema.observer.extrema"]).max()
        assert 0 < largest < 2**-126

    def test_keys_order_as_the_floats_they_stand_for(self) -> None:
        """Also where the processor takes subnormals for zeros, as a MAX of floats would then."""
        least = 2.0**-149
        ordered = [-torch.inf, -3e38, -1.0, -(2.0**-126), -3 * least, -least, 0.0]
        ordered += [-value for value in ordered[-2::-1]]
        pairs = [(a, b) for a in range(len(ordered)) for b in range(len(ordered))]
        low, high = (torch.tensor([[ordered[p[i]]] * 2 for p in pairs]) for i in (0, 1))
        want = torch.tensor([[ordered[min(p)], ordered[max(p)]] for p in pairs])
        torch.set_flush_denormal(True)
        try:
            have = distributed._extrema(distributed._keys(low).maximum(distributed._keys(high)))
        finally:
            torch.set_flush_denormal(False)
        assert torch.equal(have.view(torch.int32), want.view(torch.int32))

    def test_two_collectives_beside_the_check(self) -> None:
        check = "MAX int64 of 3"
        for found in processes.run(2, jobs.count_collectives):
            assert found == {
                "bank": [check, "MAX int32", "SUM int64"],
                "net": [check, "MAX int32", "SUM int64"],
                "weights only": [check],
                "training": [check, "SUM float64"],
            }

    def test_a_group_of_some_ranks(self) -> None:
        found = processes.run(3, jobs.subgroup)
        both = jobs.calibrated_on(jobs.batches()[0::3] + jobs.batches()[2::3])
        for rank in (0, 2):
            assert_same(found[rank][0], jobs.plain(both))
            assert found[rank][1] == ""
        assert_same(found[1][0], jobs.plain(jobs.calibrated_on(jobs.batches()[1::3])))
        assert "expected group to have this process as a member" in found[1][1]

    def test_beginning_anew(self) -> None:
        for found in processes.run(2, jobs.begin_anew):
            for turn, values in enumerate(found):
                want = jobs.plain(jobs.calibrated_on(jobs.batches()[turn::3]))
                assert_same(values, want, turn)


@pytest.fixture(scope="module")
def found() -> list[dict[str, tuple[str, str]]]:
    """The errors of every case of misuse, on three ranks."""
    return processes.run(3, faults.misuse)


class TestMisuse:
    @pytest.mark.parametrize(
        ("case", "kind", "text"),
        [
            ("names", "ValueError", "fc.input_quantizers.input on rank 0 alone"),
            ("shapes", "ValueError", ".mantissa_bits: 10 on rank 0, 8 on rank 1"),
            ("rules", "ValueError", ".observer: 'percentile' on rank 0, 'kl' on rank 1"),
            ("options", "ValueError", "{'percentile': 99.99} on rank 0, {'percentile': 99.0}"),
            ("channels", "ValueError", "channels.channel_len: 3 on rank 0, 4 on rank 1"),
            ("state", "ValueError", "conv1.input_quantizers.input.state: 'calibration' on rank 0"),
            (
                "all solved",
                "RuntimeError",
                "CALIBRATION or QAT, got validation for conv1.input_qua",
            ),
            ("twice", "RuntimeError", "hold all ranks' already: conv1.input_quantizers.input"),
            ("twice with more data", "RuntimeError", "hold all ranks' already: conv1.input_qua"),
            ("statistics broadcast", "RuntimeError", "with rank 0's: conv1.input_quantizers.input"),
            ("no group", "TypeError", "expected group to be a ProcessGroup or None, got 'gloo'"),
        ],
    )
    def test_every_rank_says_the_same(self, found: Any, case: str, kind: str, text: str) -> None:
        for of_rank in found:
            assert of_rank[case][0] == kind
            assert text in of_rank[case][1]
            assert of_rank[case][1].startswith("sync_observers: expected ")

    @pytest.mark.parametrize(
        ("case", "kind", "text"),
        [
            ("no quantizers", "ValueError", "expected model to have quantizers, got none"),
            ("no module", "TypeError", "expected model to be a torch.nn.Module, got 3"),
            ("twice on one rank", "RuntimeError", "hold all ranks' already: conv1.input_qua"),
        ],
    )
    def test_what_one_rank_refuses_all_refuse(
        self, found: Any, case: str, kind: str, text: str
    ) -> None:
        for rank, of_rank in enumerate(found):
            assert of_rank[case][0] == (kind if rank == 1 else "RuntimeError")
            assert text in of_rank[case][1]
            if rank != 1:
                assert "rank 1 raised: " in of_rank[case][1]

    def test_every_case_is_looked_at(self, found: Any) -> None:
        assert all(set(of_rank) == set(faults.MISUSE) for of_rank in found)
        assert all(text for of_rank in found for _, text in of_rank.values())

    def test_without_a_process_group(self) -> None:
        with pytest.raises(RuntimeError, match="expected a process group, got none; start the"):
            sync_observers(prepared(jobs.CONFIG))

    def test_what_is_merged_in_counts_as_synchronised(self) -> None:
        shared, own = torch_ext.Observer("min_max"), torch_ext.Observer("min_max")
        shared.synced = True
        assert not own.synced
        assert own.merge_(shared).synced
        assert not own.reset_().synced

    @pytest.mark.parametrize("through_a_file", [False, True])
    def test_a_loaded_statistic_is_marked_as_it_was(
        self, through_a_file: bool, tmp_path: Path
    ) -> None:
        source, target = solved(jobs.batches()), prepared(jobs.CONFIG)
        path = tmp_path / "params.safetensors"
        for mark in (True, False):
            for quantizer in named_quantizers(source).values():
                quantizer.observer.synced = mark
            torch_ext.save_observer_params(source, path)
            torch_ext.load_observer_params(path if through_a_file else source, target)
            marks = [quantizer.observer.synced for quantizer in named_quantizers(target).values()]
            assert marks == [mark] * len(marks)

    def test_a_damaged_mark_is_named(self, tmp_path: Path) -> None:
        path = tmp_path / "params.safetensors"
        torch_ext.save_observer_params(solved(jobs.batches()), path)
        whole = path.read_bytes()
        assert b'\\"synced\\": false' in whole
        path.write_bytes(whole.replace(b'\\"synced\\": false', b'\\"synced\\": 12345', 1))
        with pytest.raises(ValueError, match="synced: expected true or false, got 12345"):
            torch_ext.load_observer_params(path, prepared(jobs.CONFIG))

    def test_keep_statistics_local(self) -> None:
        with pytest.raises(ValueError, match="expected model to have quantizers, got none"):
            torch_ext.keep_statistics_local(nn.Linear(2, 2))


@pytest.fixture(scope="module")
def ddp() -> list[dict[str, Any]]:
    return processes.run(2, training.train_ddp)


class TestTraining:
    def test_ddp_ranges_are_the_same_on_all_ranks(self, ddp: Any) -> None:
        assert_same(ddp[0]["synced"], ddp[1]["synced"])
        for mine, theirs in zip(ddp[0]["parameters"], ddp[1]["parameters"], strict=True):
            assert np.array_equal(mine, theirs)
        assert all(found["same again"] for found in ddp)
        # or else the sync had nothing to do
        left = [found["left alone"]["conv1.input_quantizers.input.range"] for found in ddp]
        assert not np.array_equal(*left)

    def test_ddp_ranges_follow_the_mean_of_the_batches(self, ddp: Any) -> None:
        data = torch.cat(jobs.batches())
        want = torch.stack([data.min(), data.max()]).double()
        for step in range(training.STEPS):
            batch = [training.training_batch(step, rank) for rank in range(2)]
            ends = torch.stack([torch.stack([x.min(), x.max()]) for x in batch]).double()
            want += training.RATE * (ends.mean(0) - want)
        have = torch.from_numpy(ddp[0]["synced"]["conv1.input_quantizers.input.range"])[0].double()
        assert torch.allclose(have, want, rtol=1e-6, atol=0)
        scale = torch.from_numpy(ddp[0]["synced"]["conv1.input_quantizers.input.scale"])
        assert float(scale) == float((have.abs().max() * 2 / 255).float())

    def test_fsdp2(self, ddp: Any) -> None:
        found = processes.run(2, training.train_fsdp)
        assert_same(found[0]["synced"], found[1]["synced"])
        for of_rank in found:
            assert_same(of_rank["calibrated"], of_rank["alone"])
        assert np.array_equal(found[0]["output"], found[1]["output"])
        assert all(of_rank["sharded"] for of_rank in found)
        # the same training as with DDP, but for the order of sums
        for mine, theirs in zip(found[0]["parameters"], ddp[0]["parameters"], strict=True):
            assert np.allclose(mine, theirs, rtol=1e-5, atol=1e-6)
        for key, value in ddp[0]["synced"].items():
            assert np.allclose(found[0]["synced"][key], value, rtol=1e-5, atol=1e-6), key

    def test_a_rank_without_a_range_does_not_count(self) -> None:
        found = processes.run(3, training.without_ranges)
        net = prepared(mapping={"conv2": training.LEARNING})
        set_fake_quantize(net, "qat")
        before = training.ranges(net)
        net(images(4))
        want = training.ranges(net)
        for untouched, after in found:
            assert_same(untouched, before)
            for name in ACTIVATIONS:
                for field in ("range", "scale", "zero_point", "solved"):
                    key = f"{name}.{field}"
                    assert np.array_equal(after[key], want[key]), key

    def test_scales_that_are_learned_are_the_same_on_all_ranks(self) -> None:
        found = processes.run(2, training.learn)
        for key in ("ddp", "before", "fsdp", "loaded"):
            for mine, theirs in zip(found[0][key], found[1][key], strict=True):
                assert np.array_equal(mine, theirs), key
        assert np.array_equal(found[0]["output"], found[1]["output"])
        one = found[0]
        # or else there was nothing to make the same
        starts = zip(one["own start"], found[1]["own start"], strict=True)
        assert not all(np.array_equal(a, b) for a, b in starts)
        steps = zip(one["before"], one["fsdp"], strict=True)
        assert not all(np.array_equal(a, b) for a, b in steps)
        for a, b in zip(one["before"], one["loaded"], strict=True):
            assert np.array_equal(a, b)
        assert "expected quantizers to have a range before fully_shard, got none" in one["refused"]
        assert one["refused in"] == {"float"}

    def test_calibration_through_ddp(self) -> None:
        want = jobs.plain(solved(jobs.batches()))
        for own, merged in processes.run(2, training.broadcast):
            assert own
            assert_same(merged, want)


class TestFaults:
    @pytest.mark.parametrize(
        "how", ["killed", "asleep", "killed at the SUM", "killed at the very last"]
    )
    def test_a_missing_rank_is_an_error_on_the_others(self, how: str, tmp_path: Path) -> None:
        path = tmp_path / "params.safetensors"
        found = processes.run(
            3, faults.one_is_missing, how, str(path), seconds=40, group_seconds=3, may_die=(1,)
        )
        assert found[1] == processes.DIED
        for rank in (0, 2):
            text, waited, unchanged = found[rank]
            assert "sync_observers: expected every rank to take part, got" in text
            assert waited < 20
            assert unchanged
        # What was saved before is whole, and nothing else is there.
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        net = prepared(jobs.CONFIG)
        torch_ext.load_observer_params(path, net)
        set_fake_quantize(net, "validation")
        assert_same(jobs.plain(net), jobs.plain(solved(jobs.batches())))

    def test_after_a_death_the_checkpoints_serve(self, tmp_path: Path) -> None:
        given = {"seconds": 40, "group_seconds": 5}
        died = processes.run(
            2, faults.calibrate_with_checkpoints, str(tmp_path), True, may_die=(1,), **given
        )
        assert died[1] == processes.DIED
        assert "expected every rank to take part" in died[0]
        assert [p.name for p in tmp_path.iterdir()] == ["rank1.safetensors"]
        want = jobs.plain(solved(jobs.batches()))
        for found in processes.run(
            2, faults.calibrate_with_checkpoints, str(tmp_path), False, **given
        ):
            assert_same(found, want)
        assert [p.name for p in tmp_path.iterdir()] == ["params.safetensors"]
