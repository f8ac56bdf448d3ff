"""The command line given bad input: exit 2, a name and a reason, and nothing is written."""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
import pty
import re
import resource
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

import torch_ext
from cli_runs import BATCHES, CONFIG, Run, calibrated
from nets.tiny_net import prepared
from paths import ROOT
from torch_ext import calibrate, save_observer_params

TENSORRT = [
    *("convert", "net.safetensors", "--to", "tensorrt-cache"),
    *("--version", "8.6.1", "-o", "out"),
]
BAD: dict[str, tuple[list[str], str]] = {
    "missing": (["show", "nowhere"], "No such file or directory: 'nowhere'"),
    "folder": (["show", "sub"], "Is a directory: 'sub'"),
    "hostile": (["show", "hostile"], "hostile: header: truncated"),
    "not ours": (["show", "text.json"], "text.json: header: truncated, or not a safetensors file"),
    "checkpoint": (["show", "checkpoint"], "checkpoint: kind: expected 'observer_params', got"),
    "pattern": (["show", "net.safetensors", "--pattern", "x*"], 'no quantizer matches pattern "x*'),
    "rule": (["solve", "net.safetensors", "--observer", "best"], 'unknown observer "best"; known'),
    "option": (["solve", "net.safetensors", "--xmin", "0"], 'unknown option "xmin" of percentile'),
    "option's value": (
        ["solve", "net.safetensors", "--percentile", "101", "-o", "out"],
        "expected percentile to be between",
    ),
    "weights": (
        ["solve", "net.safetensors", "--pattern", "*weight*"],
        "expected quantizers of activations, got weights alone",
    ),
    "no histogram": (["solve", "plain", "--observer", "kl", "-o", "out"], "reads a histogram, but"),
    "solve's suffix": (
        ["solve", "net.safetensors", "-o", "out.json"],
        "expected --output to end in .safetensors, got 'out.json'",
    ),
    "merge's suffix": (
        ["merge", "a.safetensors", "b.safetensors", "-o", "out.pt"],
        "expected --output to end in .safetensors, got 'out.pt'",
    ),
    "folder of the result": (
        ["merge", "a.safetensors", "b.safetensors", "-o", "no/out"],
        "expected the folder no to exist",
    ),
    "unwritable": (
        ["merge", "a.safetensors", "b.safetensors", "-o", "/proc/self/out"],
        "'/proc/self/out'",
    ),
    "twice": (
        ["merge", "a.safetensors", "./a.safetensors", "-o", "out"],
        "expected every file once, got a.safetensors and ./a.safetensors",
    ),
    "one": (["merge", "a.safetensors", "-o", "out"], "expected two or more files, got 1"),
    "other models": (["merge", "a.safetensors", "plain", "-o", "out"], "plain: "),
    "unsolved": (
        ["convert", "raw", "--to", "json", "-o", "out.json"],
        "fc.input_quantizers.input: it is in CALIBRATION",
    ),
    "grid": (
        ["convert", "uint8", "--to", "tensorrt-cache", "--version", "8.6.1", "-o", "out"],
        "fc.input_quantizers.input: its grid is [0, 255]",
    ),
    "json's suffix": (
        ["convert", "net.safetensors", "--to", "json", "-o", "out.cache"],
        "expected path to end in .json, got 'out.cache'",
    ),
    "json's options": (
        ["convert", "net.safetensors", "--to", "json", "--version", "8.6.1", "-o", "out.json"],
        "unknown option --version of json; known: none",
    ),
    "report's suffix": (
        ["report", "net.safetensors", "-o", "out.safetensors"],
        "expected --output to end in .html or .htm, got '.safetensors'",
    ),
    "report's folder": (["report", "net.safetensors", "-o", "no/x.html"], "folder no to exist"),
    "names": ([*TENSORRT, "--names", "text.json"], 'text.json: content: duplicate key "a"'),
    "names of others": ([*TENSORRT, "--names", "other.json"], "names: unknown x"),
}


@pytest.fixture
def bad_folder(folder: Path) -> Path:
    (folder / "sub").mkdir()
    Path("hostile").write_bytes(b"\xff" * 100)
    Path("text.json").write_text('{"a": 1, "a": 2}')
    Path("other.json").write_text('{"x": "y"}')
    save_observer_params(calibrated(BATCHES, torch_ext.get_default_qconfig()), "plain")
    save_observer_params(calibrated(BATCHES, state="calibration"), "raw")
    unsigned = torch_ext.get_default_qconfig(activation_qkwargs={"dtype": "uint8"})
    with pytest.warns(torch_ext.QuantizationWarning):
        save_observer_params(calibrated(BATCHES, unsigned), "uint8")
    with pytest.raises(ZeroDivisionError):
        calibrate(prepared(CONFIG), (b if i == 0 else 1 / 0 for i, b in enumerate(BATCHES)),
                  checkpoint="checkpoint", every=1)  # fmt: skip
    return folder


def test_bad_input_is_refused_by_name_and_nothing_is_written(bad_folder: Path, run: Run) -> None:
    before = {path: path.read_bytes() for path in bad_folder.iterdir() if path.is_file()}
    for case, (arguments, text) in BAD.items():
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), case
        assert text in err, case
        assert err.startswith(f"torch-ext {arguments[0]}: "), case
        after = {path: path.read_bytes() for path in bad_folder.iterdir() if path.is_file()}
        assert after == before, case


def test_a_full_disk(folder: Path, run: Run) -> None:
    Path("out").write_text("what was there")
    files = set(os.listdir())
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        code, out, err = run("merge", "a.safetensors", "b.safetensors", "-o", "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert (code, out, err) == (2, "", "torch-ext merge: [Errno 27] File too large: 'out'\n")
    assert Path("out").read_text() == "what was there"
    assert set(os.listdir()) == files


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["dance"],
        ["show"],
        ["solve", "x", "--variant", "best"],
        ["solve", "x", "--percentile", "much"],
        ["compare", "x", "y", "--tolerance", "nan"],
        ["compare", "x", "y", "--top", "0"],
        ["merge", "x", "y"],
        ["report", "x"],
        ["convert", "x", "--to", "gif", "-o", "y"],
    ],
    ids=str,
)
def test_bad_usage(run: Run, arguments: list[str]) -> None:
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("usage: torch-ext")


def test_interrupted(monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def interrupt(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torch_ext.cli.info.print_json", interrupt)
    assert run("info", "--json")[0] == 130


class TestProcesses:
    """What only a process of its own shows."""

    def started(self, command: list[str], **keys: Any) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([sys.executable, *command], env=environment, **keys)

    def test_module_on_a_terminal(self, folder: Path) -> None:
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        command = ["-m", "torch_ext", "merge", "a.safetensors", "b.safetensors", "-o", "all"]
        process = self.started(command, stdout=theirs, stderr=theirs)
        os.close(theirs)
        seen = b""
        try:
            while more := os.read(ours, 65536):
                seen += more
        except OSError:  # the other end is closed
            pass
        os.close(ours)
        assert process.wait(300) == 0
        assert b"2/2" in seen
        assert b"all: 8 quantizers from 2 files" in seen
        assert Path("all").is_file()

    def test_a_reader_that_leaves(self, folder: Path) -> None:
        """As in `torch-ext show net.safetensors | head -1`."""
        reading, writing = os.pipe()
        os.close(reading)
        process = self.started(
            ["-m", "torch_ext", "info", "--json"], stdout=writing, stderr=subprocess.PIPE
        )
        os.close(writing)
        _, err = process.communicate(timeout=300)
        assert (process.returncode, err) == (141, b"")

    def test_entry_point(self, folder: Path) -> None:
        found = re.search(
            r'^\[project.scripts\]\ntorch-ext = "(\S+)"$',
            (ROOT / "pyproject.toml").read_text(),
            re.MULTILINE,
        )
        assert found
        point = importlib.metadata.EntryPoint("torch-ext", found[1], "console_scripts")
        module, _, name = point.value.partition(":")
        # What pip writes into the script.
        script = f"import sys; from {module} import {name}; sys.exit({name}())"
        process = self.started(["-c", script, "show", "nowhere"], stderr=subprocess.PIPE)
        _, err = process.communicate(timeout=300)
        assert process.returncode == 2
        assert err.decode() == ("torch-ext show: [Errno 2] No such file or directory: 'nowhere'\n")
