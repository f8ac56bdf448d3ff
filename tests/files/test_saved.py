"""Files without their model: quantizers read back, and the files of several machines as one."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_ext
from nets.tiny_net import ACTIVATIONS, WEIGHTS, TinyNet, calibrated, images, prepared
from snapshots import same, snapshot
from torch_ext import (
    calibrate,
    get_default_calib_qconfig,
    get_default_qconfig,
    load_observer_params,
    merge_observer_params,
    named_quantizers,
    read_quantizers,
    resolve,
    save_observer_params,
    set_fake_quantize,
)

RULES = torch_ext.observers()
METHODS = torch_ext.fake_quants()
BOTH = [(rule, "fake_quant") for rule in RULES] + [("percentile", m) for m in METHODS[1:]]


pytestmark = pytest.mark.usefixtures("one_thread")


def config(rule: str, method: str = "fake_quant", **keys: Any) -> torch_ext.QConfig:
    return get_default_qconfig(
        activation_observer=rule,
        weight_observer=rule,
        activation_fake_quant=method,
        activation_qkwargs=keys or None,
    )


def saved(path: Path, qconfig: Any, data: Sequence[Tensor], **keys: Any) -> Path:
    """The file of a machine that saw this data."""
    net = prepared(qconfig)
    calibrate(net, data, **keys)
    save_observer_params(net, path)
    return path


BATCHES = [images(2 + i, seed=i) * (i + 1) for i in range(6)]
SHARES = (BATCHES[:1], BATCHES[1:4], BATCHES[4:])


class TestReadQuantizers:
    @pytest.mark.parametrize(("rule", "method"), BOTH)
    def test_saved_again_the_bytes_are_the_same(
        self, tmp_path: Path, rule: str, method: str
    ) -> None:
        path = saved(tmp_path / "a", config(rule, method), BATCHES[:2])
        save_observer_params(read_quantizers(path), tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == path.read_bytes()

    def test_after_training_too(self, tmp_path: Path) -> None:
        """Learned scales and moving ranges are not those that the statistics give."""
        for method in METHODS:
            net = calibrated(get_default_qconfig(method, "lsq"))
            set_fake_quantize(net, "qat")
            optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
            net(images()).square().mean().backward()
            optimizer.step()
            save_observer_params(net, tmp_path / "a")
            save_observer_params(read_quantizers(tmp_path / "a"), tmp_path / "b")
            assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes(), method

    def test_it_stands_for_the_model(self, tmp_path: Path) -> None:
        qconfig = config("percentile")
        path = saved(tmp_path / "a", qconfig, BATCHES)
        found, net = read_quantizers(path), prepared(qconfig)
        calibrate(net, BATCHES)
        assert [row.cells for row in sorted(torch_ext.describe(found).quantizers, key=str)] == [
            row.cells for row in sorted(torch_ext.describe(net).quantizers, key=str)
        ]
        for model in (found, net):
            resolve(model, activation_observer="kl")
            torch_ext.export.json(model, tmp_path / f"{type(model).__name__}.json")
        one, two = (torch_ext.export.read_json(p) for p in sorted(tmp_path.glob("*.json")))
        assert one.quantizers.keys() == two.quantizers.keys() == {*ACTIVATIONS, *WEIGHTS}
        for name, record in one.quantizers.items():
            assert record.spec == two.quantizers[name].spec
            assert torch.equal(record.scale, two.quantizers[name].scale)
        other = prepared(qconfig)
        assert load_observer_params(found, other).complete

    def test_states(self, tmp_path: Path) -> None:
        net = prepared(config("min_max"))
        calibrate(net, BATCHES, state="calibration")
        net.fc.input_quantizers.input.reset_parameters()
        save_observer_params(net, tmp_path / "a")
        found = named_quantizers(read_quantizers(tmp_path / "a"))
        assert found["fc.input_quantizers.input"].passes_through
        assert {q.state.value for n, q in found.items() if n != "fc.input_quantizers.input"} == {
            "calibration"
        }

    def test_a_quantizer_alone(self, tmp_path: Path) -> None:
        one = torch_ext.FakeQuantize(observer="mse")
        set_fake_quantize(one, "calibration")
        one(torch.randn(100))
        save_observer_params(one, tmp_path / "a")
        assert list(named_quantizers(read_quantizers(tmp_path / "a"))) == [""]


class TestMerge:
    @pytest.mark.parametrize(("rule", "method"), BOTH)
    def test_the_bytes_are_those_of_one_run(self, tmp_path: Path, rule: str, method: str) -> None:
        qconfig = config(rule, method)
        parts = [saved(tmp_path / str(i), qconfig, share) for i, share in enumerate(SHARES)]
        whole = saved(tmp_path / "whole", qconfig, BATCHES).read_bytes()
        for order in ((0, 1, 2), (2, 0, 1)):
            report = merge_observer_params([parts[i] for i in order], tmp_path / "merged")
            assert (tmp_path / "merged").read_bytes() == whole
            assert (report.quantizers, report.again, report.unsolved) == (8, (), ())

    @pytest.mark.parametrize(
        "keys",
        [{"dtype": "uint8", "qscheme": "per_tensor_affine"}, {"power_of_two": True}],
        ids=str,
    )
    def test_other_grids(self, tmp_path: Path, keys: dict[str, Any]) -> None:
        qconfig = config("percentile", **keys)
        parts = [saved(tmp_path / str(i), qconfig, share) for i, share in enumerate(SHARES)]
        merge_observer_params(parts, tmp_path / "merged")
        whole = saved(tmp_path / "whole", qconfig, BATCHES)
        assert (tmp_path / "merged").read_bytes() == whole.read_bytes()

    def test_files_saved_in_calibration(self, tmp_path: Path) -> None:
        qconfig, keys = config("kl"), {"state": "calibration"}
        parts = [saved(tmp_path / str(i), qconfig, share, **keys) for i, share in enumerate(SHARES)]
        report = merge_observer_params(parts, tmp_path / "merged")
        whole = saved(tmp_path / "whole", qconfig, BATCHES, **keys)
        assert (tmp_path / "merged").read_bytes() == whole.read_bytes()
        assert len(report.unsolved) == 8
        assert "without a range: fc.input_quantizers.input" in str(report)

    def test_files_of_all_ranks_count_once(self, tmp_path: Path) -> None:
        """Two runs of two ranks each: every rank of a run saves the same."""
        qconfig = config("percentile")
        parts = []
        for run, share in enumerate((BATCHES[:2], BATCHES[2:])):
            net = prepared(qconfig)
            calibrate(net, share)
            for name in ACTIVATIONS:
                net.get_submodule(name).observer.synced = True
            for rank in range(2):
                parts.append(tmp_path / f"{run}.{rank}")
                save_observer_params(net, parts[-1])
        whole = saved(tmp_path / "whole", qconfig, BATCHES)
        for order in ([0, 1, 2, 3], [3, 0, 2, 1], [0, 2]):
            report = merge_observer_params([parts[i] for i in order], tmp_path / "merged")
            assert len(report.again) == len(order) - 2
            merged = named_quantizers(read_quantizers(tmp_path / "merged"))
            for name, quantizer in named_quantizers(read_quantizers(whole)).items():
                assert same(snapshot(merged[name]), snapshot(quantizer)), name
                assert merged[name].observer.synced == (name in ACTIVATIONS)
        alone = saved(tmp_path / "alone", qconfig, BATCHES[:1])
        for files in ([parts[0], alone], [alone, parts[0]]):
            with pytest.raises(ValueError, match=f"{files[1]}: synced: expected the data of") as e:
                merge_observer_params(files, tmp_path / "never")
            assert f"as in {files[0]}" in str(e.value)
        assert not (tmp_path / "never").exists()

    def test_equal_data_of_two_machines_counts_twice(self, tmp_path: Path) -> None:
        qconfig = config("percentile")
        parts = [saved(tmp_path / name, qconfig, BATCHES[:1]) for name in "ab"]
        merge_observer_params(parts, tmp_path / "merged")
        whole = saved(tmp_path / "whole", qconfig, [BATCHES[0], BATCHES[0]])
        assert (tmp_path / "merged").read_bytes() == whole.read_bytes()

    def test_the_result_may_replace_a_part(self, tmp_path: Path) -> None:
        qconfig = config("min_max")
        parts = [saved(tmp_path / str(i), qconfig, share) for i, share in enumerate(SHARES)]
        merge_observer_params(parts, parts[1])
        whole = saved(tmp_path / "whole", qconfig, BATCHES)
        assert parts[1].read_bytes() == whole.read_bytes()

    def test_it_shows_a_bar_on_request(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        parts = [saved(tmp_path / str(i), config("min_max"), BATCHES[:1]) for i in range(2)]
        merge_observer_params(parts, tmp_path / "merged")
        assert capsys.readouterr() == ("", "")
        merge_observer_params(parts, tmp_path / "merged", progress=True)
        assert "2/2" in capsys.readouterr().err


class TestRefusals:
    @pytest.fixture
    def first(self, tmp_path: Path) -> Path:
        return saved(tmp_path / "first", config("percentile"), BATCHES[:1])

    def refused(self, files: Sequence[Path], text: str) -> None:
        target = files[0].parent / "merged"
        for order in itertools.permutations(files):
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
                merge_observer_params(order, target)
            assert text in str(caught.value)
            assert not target.exists()

    def test_too_few_or_the_same(self, first: Path) -> None:
        self.refused([first], "merge_observer_params: expected two or more files, got 1")
        os.link(first, first.with_name("link"))
        self.refused([first, first.with_name("link")], "expected every file once, got")

    @pytest.mark.parametrize(
        ("qconfig", "text"),
        [
            (config("kl"), ".observer: expected "),
            (config("percentile", percentile=99.0), ".options: expected {'percentile': 99"),
            (config("percentile", dtype="int4"), ".dtype: expected "),
            (config("percentile", "lsq"), ".method: expected "),
        ],
    )
    def test_other_configurations(self, first: Path, qconfig: Any, text: str) -> None:
        other = saved(first.with_name("other"), qconfig, BATCHES[1:])
        self.refused([first, other], text)

    def test_other_models(self, first: Path) -> None:
        net = prepared(config("percentile"), mapping={"fc": None})
        calibrate(net, BATCHES)
        save_observer_params(net, first.with_name("other"))
        self.refused(
            [first, first.with_name("other")],
            "quantizers: of another model than",
        )

    def test_other_weights(self, first: Path) -> None:
        net = prepared(config("percentile"))
        with torch.no_grad():
            net.fc.parametrizations.weight.original[0, 0] += 9
        calibrate(net, BATCHES)
        save_observer_params(net, first.with_name("other"))
        text = "fc.parametrizations.weight.0.range: expected the values of"
        self.refused([first, first.with_name("other")], text)

    def test_ranges_that_are_not_of_the_statistic(self, first: Path) -> None:
        net: TinyNet = prepared(config("percentile"))
        calibrate(net, BATCHES, state="qat")
        net(images() * 3)  # moves the ranges
        save_observer_params(net, first.with_name("other"))
        text = ".range: expected the range that percentile computes from the statistic, got"
        self.refused([first, first.with_name("other")], text)
        empty = prepared(get_default_calib_qconfig(weight_observer="percentile"))
        load_observer_params(first, empty)
        torch_ext.reset_statistics(empty)
        save_observer_params(empty, first.with_name("empty"))
        self.refused([first, first.with_name("empty")], text)

    def test_damaged_and_missing_files(self, first: Path) -> None:
        other = first.with_name("other")
        other.write_bytes(first.read_bytes()[:-1])
        self.refused([first, other], f"{other}: data: truncated or too long")
        with pytest.raises(FileNotFoundError, match="nowhere"):
            merge_observer_params([first, first.with_name("nowhere")], first.with_name("merged"))
        one = saved(first.with_name("one"), config("percentile"), BATCHES[1:2])
        with pytest.raises(FileNotFoundError, match="expected the folder"):
            merge_observer_params([first, one], first.parent / "nowhere" / "merged")
