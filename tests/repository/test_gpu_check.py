"""make gpu-check without a GPU: how far it goes, and its steps with stand-ins for what they run."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import gpu_check
from paths import ROOT

# Stands in for compute-sanitizer: racecheck finds something, initcheck never ends.
SANITIZER = """#!/bin/sh
echo "$@"
[ "$1" != --help ] || echo "  --kernel-regex arg"
case "$*" in *racecheck*) exit 9;; *initcheck*) sleep 60;; esac
"""
FACTS = {"torch": "2.14.1+cu130", "gpu": "Some GPU", "capability": "90", "cuda": "13.0", "nvcc": ""}


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> gpu_check.Check:
    monkeypatch.setattr(gpu_check, "OUT", tmp_path)
    return gpu_check.Check(FACTS, list(gpu_check.LIMITS))


def run(out: Path, *steps: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OUT": str(out), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "tools/gpu_check.py", *steps]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path, "tests", "sanitizer", "benchmarks")
    assert done.returncode == 3
    want = "torch finds no GPU here, so these steps did not run: sanitizer, benchmarks, tests"
    assert done.stdout.splitlines()[-1] == f"gpu-check: {want}"
    assert (tmp_path / "summary.txt").read_text().splitlines()[0] == f"gpu-check: {want}"
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["torch"], summary["gpu"], summary["steps"]) == (torch.__version__, None, [])


def test_bad_steps_are_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "tests", "test")
    assert done.returncode == 2
    want = "expected STEP to be one of build, parity, sanitizer, benchmarks, tests"
    assert f'gpu-check: {want}, got "test"' in done.stdout


def test_missing_packages_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "NEEDED", ("torch", "no_such_package"))
    monkeypatch.setattr(sys, "argv", ["gpu_check.py"])
    assert gpu_check.main() == 2
    assert "got no no_such_package" in capsys.readouterr().out


def test_all_steps_fit_into_eight_minutes(check: gpu_check.Check) -> None:
    steps = list(gpu_check.LIMITS)
    assert steps[:2] == ["build", "parity"]
    assert check.deadline(steps[-1]) - time.monotonic() <= 8 * 60 - 20
    # A step that starts late takes nothing from those after it.
    for step, after in itertools.pairwise(steps):
        later = check.deadline(after) - check.deadline(step)
        assert later == pytest.approx(gpu_check.LIMITS[after])


def test_every_gpu_test_is_in_one_step(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: dict[str, list[str]] = {}
    monkeypatch.setattr(check, "run", lambda step, command, **_: commands.update({step: command}))
    check.parity()
    check.tests()
    for file in gpu_check.PARITY_FILES:
        assert (ROOT / file).is_file()
        assert file in commands["parity"]
        assert f"--ignore={file}" in commands["tests"]
    assert "tests/cuda" in commands["tests"]


# What a run leaves that is killed in its second step, whose children ignore polite signals.
KILLED = """
import sys
import gpu_check

gpu_check.OUT = gpu_check.Path({out!r})
check = gpu_check.Check({facts!r}, ["build", "parity", "tests"])
check.build = lambda: check.run("build", ["echo", "built"])
deaf = "trap '' TERM; echo $$; sleep 60; sleep 60"
check.parity = lambda: check.run("parity", ["sh", "-c", deaf])
gpu_check.signal.signal(gpu_check.signal.SIGTERM, gpu_check.interrupt)
check.all_steps()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_leaves_what_it_found(tmp_path: Path, number: signal.Signals) -> None:
    program = KILLED.format(out=str(tmp_path), facts=FACTS)
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT / "tools", stdout=subprocess.DEVNULL
    )
    log = tmp_path / "parity.log"
    deadline = time.monotonic() + 20
    while not (log.is_file() and log.read_text().strip()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    process.wait(20)
    first, *rest = (tmp_path / "summary.txt").read_text().splitlines()
    undone = "not done: parity, tests (python tools/gpu_check.py parity tests)"
    if number == signal.SIGKILL:
        os.killpg(int(log.read_text()), signal.SIGKILL)  # nobody else ends it
        assert first == f"gpu-check: {undone}"
    else:
        assert first == f"gpu-check: no success: parity (interrupted (SIGTERM)); {undone}"
        assert not is_alive(int(log.read_text()))
    assert [line.split()[:2] for line in rest if line.startswith("build")] == [["build", "ok"]]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["undone"] == ["parity", "tests"]


def is_alive(process: int) -> bool:
    status = Path("/proc") / str(process) / "status"
    return status.is_file() and "(zombie)" not in status.read_text()


def test_a_step_is_stopped_with_its_children(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "deadline", lambda step: time.monotonic() + 0.5)
    check.run("tests", ["sh", "-c", "sleep 60 & echo $!; wait"])
    assert [r.outcome for r in check.results] == ["out of time"]
    assert check.results[0].seconds < 10
    child = int((tmp_path / "tests.log").read_text())
    deadline = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_failed_step_does_not_stop_the_others(
    check: gpu_check.Check, capsys: pytest.CaptureFixture[str]
) -> None:
    check.run("tests", ["sh", "-c", "echo too bad; exit 7"])
    check.run("benchmarks", ["echo", "all well"], SOME="thing")
    assert [(r.outcome, r.last_line) for r in check.results] == [
        ("failed (7)", "too bad"),
        ("ok", "all well"),
    ]
    check.summary("closing")
    out = capsys.readouterr().out.splitlines()
    assert "gpu-check: closing" in out
    assert [line.split()[:2] for line in out[-4:-1]] == [
        ["step", "outcome"],
        ["tests", "failed"],
        ["benchmarks", "ok"],
    ]


def test_every_checker_runs(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "sanitizer_places", lambda: str(tmp_path))
    check.sanitizer()
    assert [(r.outcome, r.last_line) for r in check.results] == [
        ("failed", "no compute-sanitizer was found")
    ]
    check.results.clear()
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "compute-sanitizer"
    program.write_text(SANITIZER)
    program.chmod(0o755)
    monkeypatch.setattr(gpu_check, "sanitizer_places", lambda: str(program.parent))
    monkeypatch.setattr(check, "deadline", lambda step: time.monotonic() + 1)
    check.sanitizer()
    assert [(r.step, r.outcome) for r in check.results] == [
        ("memcheck", "ok"),
        ("racecheck", "failed (9)"),
        ("synccheck", "ok"),
        ("initcheck", "out of time"),
    ]
    log = (tmp_path / "sanitizer.log").read_text()
    for result in check.results:
        assert f"==== {result.step}\n" in log
        assert "--kernel-regex kns=torch_ext" in log
        assert f"--tool {result.step} {sys.executable} -m pytest" in log
    assert not list(tmp_path.glob("*.part"))


def test_long_logs_keep_both_ends(
    check: gpu_check.Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu_check, "LONGEST_LOG", 100)
    check.run("tests", [sys.executable, "-c", "print('first', '.' * 500, 'last')"])
    log = (tmp_path / "tests.log").read_text()
    assert log.startswith("first")
    assert log.endswith("last\n")
    assert len(log) < 150
