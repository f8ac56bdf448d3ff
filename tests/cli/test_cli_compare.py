"""`compare`: relative differences of ranges and scales, largest first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from cli_runs import Run, rows
from torch_ext import FakeQuantize, save_observer_params


def of_ranges(**ranges: Any) -> nn.ModuleDict:
    """Quantizers per channel that have these ranges."""
    net = nn.ModuleDict()
    for name, range_ in ranges.items():
        keys = {"qscheme": "per_channel_symmetric", "ch_axis": 0, "channel_len": len(range_)}
        net[name] = FakeQuantize("fake_quant", "min_max", quant_min=-127, **keys)
        torch_ext.set_fake_quantize(net[name], "calibration")
        net[name](torch.tensor(range_))
        torch_ext.set_fake_quantize(net[name], "validation")
    return net


class TestCompare:
    @pytest.fixture
    def files(self, folder: Path) -> tuple[str, str]:
        equal, one = [[-1.0, 1.0]], [[-1.0, 1.0], [-2.0, 2.0]]
        save_observer_params(
            of_ranges(same=equal, far=[[-4.0, 1.0]], near=one, wide=one, gone=equal), "one"
        )
        save_observer_params(
            of_ranges(
                same=equal,
                far=[[-1.0, 1.0]],
                near=[[-1.0, 1.0], [-1.5, 2.0]],
                wide=one * 2,
                new=equal,
            ),
            "two",
        )
        return "one", "two"

    def test_largest_difference_first(self, files: tuple[str, str], run: Run) -> None:
        code, out, err = run("compare", *files)
        assert (code, err) == (0, "")
        found = rows(out)
        assert list(found) == ["quantizer", "wide", "far", "near", "same"]
        assert found["wide"][1] == "2 and 4 channels"
        # far: 4 and 1 apart by 3 of 4; near: the scale is of the larger side, the range is not
        assert [found[name][1] for name in ("far", "near", "same")] == ["75 %", "25 %", "equal"]
        assert found["far"][2:6] == ["[-4, 1]", "[-1, 1]", "0.0314961", "0.00787402"]
        assert "only in A: gone\nonly in B: new\n4 quantizers in both, 3 of them differ\n" in out

    def test_json(self, files: tuple[str, str], run: Run) -> None:
        _, out, _ = run("compare", *files, "--json")
        told = json.loads(out)
        assert (told["only_a"], told["only_b"]) == (["gone"], ["new"])
        by_name = {row["name"]: row for row in told["quantizers"]}
        assert by_name["wide"]["scale"] is None
        assert (by_name["near"]["scale"], by_name["near"]["range"]) == (0, 0.25)
        assert by_name["far"]["scale"] == pytest.approx(0.75)
        assert by_name["far"]["a"]["range"] == [[-4, 1]]

    def test_other_names_are_beyond_every_tolerance(self, folder: Path, run: Run) -> None:
        save_observer_params(of_ranges(x=[[-1.0, 1.0]]), "one")
        save_observer_params(of_ranges(x=[[-1.0, 1.0]], y=[[-1.0, 1.0]]), "two")
        for files in (("one", "two"), ("two", "one")):
            assert run("compare", *files, "--tolerance", "1e9")[0] == 1
            assert run("compare", *files)[0] == 0

    def test_tolerance(self, folder: Path, run: Run) -> None:
        save_observer_params(of_ranges(x=[[-4.0, 1.0]]), "one")
        save_observer_params(of_ranges(x=[[-3.0, 1.0]]), "two")
        codes = [run("compare", *("one", "two"), "--tolerance", t)[0] for t in ("0.2", "0.26")]
        assert codes == [1, 0]
        assert run("compare", "one", "one", "--tolerance", "0")[0] == 0

    def test_top(self, files: tuple[str, str], run: Run) -> None:
        _, out, _ = run("compare", *files, "--top", "1")
        assert list(rows(out)) == ["quantizer", "wide"]
        assert "... and 3 that differ less\n" in out

    def test_without_ranges(self, folder: Path, run: Run) -> None:
        save_observer_params(nn.ModuleDict({"x": FakeQuantize()}), "none")
        save_observer_params(of_ranges(x=[[-3.0, 1.0]]), "some")
        assert rows(run("compare", "none", "some")[1])["x"][1] == "no range in A"
        assert run("compare", "none", "some", "--tolerance", "9")[0] == 1
        assert run("compare", "none", "none", "--tolerance", "0")[0] == 0

    def test_dynamic_quantizers_differ_by_their_format(self, folder: Path, run: Run) -> None:
        """There is no range, so what decides their values are their keys alone."""
        usual: dict[str, Any] = {"dynamic": True, "group_size": 8}
        others: dict[str, tuple[dict[str, Any], str]] = {
            "same": ({}, "no range in A and B"),
            "dtype": ({"dtype": "float8_e4m3"}, "dtype int8 and float8_e4m3"),
            "group": ({"group_size": 4}, "group_size 8 and 4"),
            "token": ({"group_size": None}, "group_size 8 and None"),
            "axis": ({"ch_axis": -3}, "ch_axis -1 and -3"),
            "rule": ({"scale_rule": "floor"}, "scale_rule grid and floor"),
            "power": ({"power_of_two": True}, "power_of_two False and True"),
            "ends": ({"quant_min": -127}, "quant_min -128 and -127"),
            "fixed": ({"dynamic": False, "group_size": None}, "dynamic True and False"),
        }
        nets = [nn.ModuleDict(), nn.ModuleDict()]
        for name, (keys, _) in others.items():
            for net, more in zip(nets, ({}, keys), strict=True):
                net[name] = FakeQuantize("fake_quant", "min_max", **usual | more)
        scaled = {**usual, "dtype": "float4_e2m1"}
        for net, more in zip(nets, ({}, {"scale_dtype": "float8_e4m3"}), strict=True):
            net["nvfp4"] = FakeQuantize("fake_quant", "min_max", **scaled, **more)
        for net, path in zip(nets, ("one", "two"), strict=True):
            save_observer_params(net, path)
        code, out, _ = run("compare", "one", "two", "--tolerance", "1e9")
        found = rows(out)
        for name, (_, note) in others.items():
            assert found[name][1] == note
        assert found["nvfp4"][1] == "scale_dtype None and float8_e4m3"
        assert f"{len(others) + 1} quantizers in both, {len(others)} of them differ" in out
        assert code == 1
        assert run("compare", "one", "one", "--tolerance", "0")[0] == 0

    def test_formats_that_differ_are_noted_beside_the_numbers(self, folder: Path, run: Run) -> None:
        for path, keys in (("one", {"quant_min": -127}), ("two", {"dtype": "float8_e4m3"})):
            net = nn.ModuleDict({"x": FakeQuantize("fake_quant", "min_max", **keys)})  # type: ignore[arg-type]
            torch_ext.set_fake_quantize(net, "calibration")
            net["x"](torch.tensor([-1.0, 1.0]))
            torch_ext.set_fake_quantize(net, "validation")
            save_observer_params(net, path)
        _, out, _ = run("compare", "one", "two")
        # 1 - 127/448 of the scales
        assert rows(out)["x"][1] == "71.7 %, dtype int8 and float8_e4m3"
