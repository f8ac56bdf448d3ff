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
