"""The command line: what it prints and writes is what the functions give."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from cli_runs import BATCHES, Run, calibrated, rows
from nets.tiny_net import ACTIVATIONS, WEIGHTS
from torch_ext import _C, FakeQuantize, named_quantizers, resolve, save_observer_params
from torch_ext.cli.main import main
from torch_ext.files.observer_params import read_observer_params

RULES = torch_ext.observers()
COMMANDS = ("info", "show", "solve", "compare", "merge", "convert", "report")


class TestHelp:
    def test_commands_are_listed(self, run: Run) -> None:
        code, out, err = run("--help")
        assert (code, err) == (0, "")
        for command in COMMANDS:
            assert re.search(rf"^    {command} +\w", out, re.MULTILINE)
        assert "exit status:" in out

    @pytest.mark.parametrize("command", COMMANDS)
    def test_the_example_of_every_command_works(self, folder: Path, run: Run, command: str) -> None:
        code, out, _ = run(command, "--help")
        assert code == 0
        example = out.split("example:\n")[1].split()
        assert example[:2] == ["torch-ext", command]
        files = set(os.listdir())
        code, out, err = run(*example[1:])
        assert (code, err) == (1 if command == "compare" else 0, "")
        assert out
        if "-o" in example:
            assert set(os.listdir()) == files | {example[example.index("-o") + 1]}

    def test_every_option_of_every_rule_is_there(self, run: Run) -> None:
        _, out, _ = run("solve", "--help")
        for rule in RULES:
            for option in _C.observer_info(rule)["options"]:
                assert f"--{option['name'].replace('_', '-')}" in out

    def test_version(self, run: Run) -> None:
        assert run("--version") == (0, f"{torch_ext.__version__}\n", "")


def test_info(run: Run) -> None:
    _, out, _ = run("info")
    found = rows(out)
    assert set(RULES) <= found.keys()
    assert found["percentile"] == ["percentile", "histogram", "16", "percentile 99.99"]
    for key, value in torch_ext.build_info().items():
        assert f"{key}: {value}\n" in out
    assert f"fake-quants: {', '.join(torch_ext.fake_quants())}\n" in out
    _, out, _ = run("info", "--json")
    told = json.loads(out)
    assert list(told["observers"]) == list(RULES)
    assert {key: told[key] for key in torch_ext.build_info()} == torch_ext.build_info()


class TestShow:
    def test_every_quantizer_with_range_and_scale(self, folder: Path, run: Run) -> None:
        code, out, err = run("show", "net.safetensors")
        assert (code, err) == (0, "")
        found = rows(out)
        assert found.keys() - {"quantizer"} >= {*ACTIVATIONS, *WEIGHTS}
        for name, quantizer in named_quantizers(calibrated(BATCHES)).items():
            low, high = quantizer.range[:, 0].min(), quantizer.range[:, 1].max()
            assert f"[{low:.6g}, {high:.6g}]" in found[name]
            assert str(int(quantizer.observer.tally[:, 0].sum())) == found[name][-1]
        assert found["conv1.input_quantizers.input"][1:3] == [
            "input",
            "percentile(percentile=99.99)",
        ]

    def test_json_has_every_bit(self, folder: Path, run: Run) -> None:
        _, out, _ = run("show", "net.safetensors", "--json")
        told = json.loads(out)["quantizers"]
        quantizers = named_quantizers(calibrated(BATCHES))
        assert told.keys() == quantizers.keys()
        for name, quantizer in quantizers.items():
            assert torch.equal(torch.tensor(told[name]["range"]), quantizer.range)
            assert torch.equal(torch.tensor(told[name]["scale"]), quantizer.scale)
            assert told[name]["values"]["finite"] == int(quantizer.observer.tally[:, 0].sum())
            assert told[name]["solved"] is True

    def test_pattern(self, folder: Path, run: Run) -> None:
        _, out, _ = run("show", "net.safetensors", "--pattern", "fc.*", "--pattern", "conv1.*")
        wanted = {n for n in (*ACTIVATIONS, *WEIGHTS) if n.startswith(("fc.", "conv1."))}
        assert {name for name in rows(out) if "." in name} == wanted

    def test_what_deserves_a_look_and_what_has_no_range(self, folder: Path, run: Run) -> None:
        net = nn.ModuleDict({"é[red]": FakeQuantize(dtype="uint8"), "none": FakeQuantize()})
        torch_ext.set_fake_quantize(net, "calibration")
        net["é[red]"](torch.tensor([-2.0, 1, torch.nan]))
        with pytest.warns(torch_ext.QuantizationWarning):
            torch_ext.set_fake_quantize(net, "validation", allow_unobserved=True)
        save_observer_params(net, "odd")
        _, out, _ = run("show", "odd")
        assert "note: é[red]: negative values, down to -2, clip to 0\n" in out
        assert rows(out)["none"][-2:] == ["none yet", "0"]
        assert rows(out)["é[red]"][-1] == "0, 1"
        _, out, _ = run("show", "odd", "--json")
        told = json.loads(out)["quantizers"]
        assert told["none"]["solved"] is False
        assert told["none"]["values"]["minimum"] is None

    def test_a_terminal_gets_a_table_of_its_width(
        self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("COLUMNS", "90")
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
        _, out, _ = run("show", "net.safetensors")
        lines = re.sub(r"\x1b\[[\d;]*m", "", out).splitlines()
        assert max(map(len, lines)) <= 90
        assert any("─" in line for line in lines)
        save_observer_params(nn.ModuleDict({"a[red]": FakeQuantize()}), "markup")
        assert "a[red]" in run("show", "markup")[1]

    def test_without_rich_the_table_is_plain(
        self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        _, plain, _ = run("show", "net.safetensors")
        monkeypatch.setattr(type(sys.stdout), "isatty", lambda _: True)
        monkeypatch.setitem(sys.modules, "rich", None)
        assert run("show", "net.safetensors") == (0, plain, "")

    def test_a_stream_that_lacks_a_letter(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_observer_params(nn.ModuleDict({"é": FakeQuantize()}), "accent")
        stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["show", "accent"]) == 0
        assert b"\\xe9" in stream.buffer.getvalue()  # type: ignore[attr-defined]


class TestSolve:
    @pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "fixed_scale"])
    def test_it_is_resolve(self, folder: Path, run: Run, rule: str) -> None:
        before = Path("net.safetensors").read_bytes()
        assert run("solve", "net.safetensors", "--observer", rule, "-o", "new")[0] == 0
        net = calibrated(BATCHES)
        resolve(net, activation_observer=rule)
        save_observer_params(net, "want")
        assert Path("new").read_bytes() == Path("want").read_bytes()
        assert Path("net.safetensors").read_bytes() == before

    @pytest.mark.parametrize(
        ("arguments", "options"),
        [
            (["--percentile", "99"], {"percentile": 99.0}),
            (["--observer", "clip", "--xmin", "-0.5"], {"xmin": -0.5}),
            (["--observer", "clip_std", "--std-scale", "2"], {"std_scale": 2.0}),
            (["--observer", "kl", "--variant", "ncnn"], {"variant": "ncnn"}),
        ],
    )
    def test_options_and_patterns(
        self, folder: Path, run: Run, arguments: list[str], options: dict[str, Any]
    ) -> None:
        code, out, _ = run(
            "solve", "net.safetensors", *arguments, "--pattern", "[!a]*.input_q*", "-o", "new"
        )
        assert code == 0
        assert "add.input_quantizers.a" not in rows(out)
        net = calibrated(BATCHES)
        rule = arguments[1] if arguments[0] == "--observer" else "percentile"
        resolve(net, rule, pattern="[!a]*.input_q*", **options)
        save_observer_params(net, "want")
        assert Path("new").read_bytes() == Path("want").read_bytes()

    def test_names_are_no_patterns(self, folder: Path, run: Run) -> None:
        net = nn.ModuleDict({name: FakeQuantize(observer="kl") for name in ("a[b]", "ab", "*")})
        torch_ext.set_fake_quantize(net, "calibration")
        for quantizer in net.values():
            quantizer(torch.randn(100))
        torch_ext.set_fake_quantize(net, "validation")
        save_observer_params(net, "odd")
        code, _, err = run("solve", "odd", "--observer", "mse", "--pattern", "a[[]*", "-o", "new")
        assert (code, err) == (0, "")
        found = read_observer_params("new")
        assert {n: p.observer for n, p in found.items()} == {"a[b]": "mse", "ab": "kl", "*": "kl"}

    def test_nothing_is_written_unless_asked_for(self, folder: Path, run: Run) -> None:
        files = set(os.listdir())
        _, out, _ = run("solve", "net.safetensors", "--observer", "min_max", "--json")
        assert set(os.listdir()) == files
        net = calibrated(BATCHES)
        resolve(net, "min_max")
        told = json.loads(out)["quantizers"]
        assert told.keys() == set(ACTIVATIONS)
        for name in ACTIVATIONS:
            want = net.get_submodule(name)
            assert torch.equal(torch.tensor(told[name]["scale"]), want.scale)

    def test_a_file_saved_in_calibration_gets_its_ranges(self, folder: Path, run: Run) -> None:
        save_observer_params(calibrated(BATCHES, state="calibration"), "raw")
        assert run("solve", "raw", "-o", "solved")[0] == 0
        found, want = read_observer_params("solved"), read_observer_params("net.safetensors")
        for name in ACTIVATIONS:
            assert torch.equal(found[name]["scale"], want[name]["scale"])


class TestMerge:
    def test_it_is_merge_observer_params(self, folder: Path, run: Run) -> None:
        save_observer_params(calibrated(BATCHES[3:]), "c")
        assert run("merge", "a.safetensors", "b.safetensors", "c", "-o", "all") == (
            *(0, "all: 8 quantizers from 3 files\n", ""),
        )
        assert Path("all").read_bytes() == Path("net.safetensors").read_bytes()
        _, out, _ = run("merge", "a.safetensors", "b.safetensors", "-o", "some", "--json")
        assert json.loads(out)["quantizers"] == 8

    def test_quiet(self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        arguments = ("merge", "a.safetensors", "b.safetensors", "-o", "all")
        monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
        assert re.search(r"2/2 \[\d\d:\d\d<\d\d:\d\d, +[\d.]+(it/s|s/it)", run(*arguments)[2])
        assert run(*arguments, "--quiet")[2] == ""


class TestConvert:
    def test_json(self, folder: Path, run: Run) -> None:
        assert run("convert", "net.safetensors", "--to", "json", "-o", "net.json")[0] == 0
        torch_ext.export.json(calibrated(BATCHES), "want.json")
        found, want = (json.loads(Path(p).read_text()) for p in ("net.json", "want.json"))
        assert found == want

    def test_tensorrt_cache(self, folder: Path, run: Run) -> None:
        names = {name: [f"t{i}", f"t {i}"] for i, name in enumerate(sorted(ACTIVATIONS[1:]))}
        Path("names.json").write_text(json.dumps(names))
        version = ("--version", "8.6.1", "--algorithm", "MinMaxCalibration", "-o", "net.cache")
        code, out, _ = run(
            *("convert", "net.safetensors", "--to", "tensorrt-cache", "--names", "names.json"),
            *("--without", "conv1.input*", *version),
        )
        assert code == 0
        assert "left out: conv1.input_quantizers.input (it is in FLOAT)" in out
        net = calibrated(BATCHES)
        torch_ext.set_fake_quantize(net, "float", pattern="conv1.input*")
        torch_ext.export.tensorrt_cache(
            net, "want.cache", version="8.6.1", algorithm="MinMaxCalibration", names=names
        )
        found, want = (sorted(Path(p).read_text().split("\n")) for p in ("net.cache", "want.cache"))
        assert found == want


class TestReport:
    def test_it_is_the_page_of_report(self, folder: Path, run: Run) -> None:
        code, out, err = run("report", "net.safetensors", "-o", "page.html")
        assert (code, err) == (0, "")
        summary = torch_ext.report("net.safetensors", "want.html")
        assert out == str(summary).replace("want.html", "page.html") + "\n"
        assert Path("page.html").read_bytes() == Path("want.html").read_bytes()

    def test_quiet(self, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(type(sys.stderr), "isatty", lambda _: True)
        assert re.search(r"it/s|s/it", run("report", "a.safetensors", "-o", "page.html")[2])
        assert run("report", "a.safetensors", "-o", "page.html", "-q")[2] == ""
