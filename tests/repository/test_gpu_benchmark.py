"""The GPU's benchmark without a GPU: its arguments, cases, timer, table and record."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import case as cases_of_benchmarks
import run_gpu
import tables
import timing
import torch_ext
from gpu import cases as gpu_cases
from gpu import inputs as gpu_inputs
from gpu import native as gpu_native
from gpu import solve as gpu_solve
from paths import ROOT

FOLDER = ROOT / "benchmarks"
PROGRAM = FOLDER / "run_gpu.py"
HAS_DEVICE = torch.cuda.is_available() and torch_ext.build_info()["cuda"]

CPU = torch.device("cpu")
SIZE = 1 << 16


def program(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if k != "OUT"} | variables
    return subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=kept,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.skipif(HAS_DEVICE, reason="there is a device: it would measure")
def test_without_a_gpu_it_says_so(tmp_path: Path):
    for arguments in ([], ["--save", "--out", str(tmp_path)]):
        done = program(*arguments)
        assert done.returncode == run_gpu.NO_GPU == 3
        assert "nothing to measure" in done.stderr
    assert not list(tmp_path.iterdir())


def test_cases_can_be_listed_anywhere():
    listed = program("--list").stdout.splitlines()
    assert len(listed) == len(set(listed)) > 25
    for part in ("observe/min_max", "observe/histogram module", "follow+forward", "kl/onnxruntime"):
        assert any(part in line for line in listed), part
    assert program("--list", "--only", "kl").stdout.count("\n") < len(listed)


@pytest.mark.parametrize(
    ("arguments", "want"),
    [
        (["--save", "--quick"], "expected a run of everything"),
        (["--save", "--only", "kl"], "expected a run of everything"),
        (["--sizes", "1000"], "expected multiples of 4096"),
        (["--sizes", "512Mi"], "up to 256Mi"),
        (["--rounds", "0"], "expected a number of rounds"),
        (["--list", "--only", "nothing"], 'expected --only to match a case, got "nothing"'),
        (["--fast"], "unrecognized arguments"),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(arguments: list[str], want: str):
    done = program(*arguments)
    assert done.returncode not in (0, run_gpu.NO_GPU)
    assert want in done.stderr


def parsed(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> argparse.Namespace:
    monkeypatch.setattr(sys, "argv", ["run_gpu.py", *arguments])
    return run_gpu.parse()


def test_arguments(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.delenv("OUT", raising=False)
    chosen = parsed(monkeypatch)
    assert chosen.sizes == [64 << 10, 1 << 20, 64 << 20, 256 << 20]
    assert (chosen.rounds, chosen.out, chosen.save) == (7, None, False)
    assert parsed(monkeypatch, "--quick").rounds == 3
    monkeypatch.setenv("OUT", str(tmp_path))
    assert parsed(monkeypatch).out == tmp_path
    assert parsed(monkeypatch, "--out", "x").out == Path("x")
    monkeypatch.setenv("OUT", "")
    assert parsed(monkeypatch).out is None


class Counting:
    """A timer that runs each call once and reports 1 ms, 2 ms, ... by the order of first use."""

    def __init__(self) -> None:
        self.known: dict[int, float] = {}
        self.calls = 0

    def __call__(self, run: Callable[[], object], repeats: int) -> float:
        run()
        self.calls += 1
        return self.known.setdefault(id(run), (len(self.known) + 1) * 1e-3)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What only a GPU can do, done by Torch."""

    def histogram(xs: list[Tensor], bins: int, low: float, high: float) -> Any:
        return gpu_native.rotating(
            [lambda x=x: torch.histc(x.float(), bins, low, high) for x in xs]
        )

    def ceilings(kind: str, xs: list[Tensor]) -> Any:
        assert kind in ("read", "copy", "2r1w")
        return {kind: gpu_native.rotating([x.clone for x in xs])}

    monkeypatch.setattr(gpu_native, "cub_histogram", histogram)
    monkeypatch.setattr(gpu_native, "ceilings", ceilings)
    monkeypatch.setattr(gpu_solve, "QUANTIZERS", 4)
    with torch.no_grad():
        yield


def session(monkeypatch: pytest.MonkeyPatch, sampler: Any) -> run_gpu.Session:
    return run_gpu.Session(parsed(monkeypatch, "--rounds", "2", "--sizes", "64Ki"), sampler)


def test_every_case_runs_and_agrees_with_its_peers(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    timer = Counting()
    trial = session(monkeypatch, timer)
    listed = [*gpu_cases.cases(CPU), *gpu_solve.cases(CPU)]
    for one in listed:
        trial.run(one)
    notes = [n for n in trial.notes if "no torch.ao" not in n and "onnxruntime is not" not in n]
    assert notes == []
    assert not trial.failed
    names = {row.case for row in trial.rows}
    assert len(names) >= len(listed) - 2
    assert all(row.threads == 0 and row.seconds > 0 for row in trial.rows)
    assert timer.calls > 4 * len(trial.rows)
    assert "    - " in capsys.readouterr().out  # no number of threads


def test_a_wrong_result_is_not_timed(on_cpu: None, monkeypatch: pytest.MonkeyPatch):
    trial = session(monkeypatch, Counting())
    wrong = gpu_cases.cases(CPU)[0]
    real = torch.aminmax
    monkeypatch.setattr(torch, "aminmax", lambda x, **keys: real(x + 1, **keys))
    trial.run(wrong)
    assert trial.failed
    assert trial.rows == []
    assert "ours and the peer disagree: extrema" in trial.notes[0]


def test_a_type_that_torch_has_no_op_for_has_no_peer(on_cpu: None, monkeypatch: pytest.MonkeyPatch):
    def refuse() -> None:
        raise NotImplementedError("not implemented for 'BFloat16'")

    monkeypatch.setattr(gpu_cases.Setup, "torch", lambda setup, x: refuse)
    trial = session(monkeypatch, Counting())
    (chosen,) = [c for c in gpu_cases.cases(CPU) if c.name == "fake_quant/forward+mask bfloat16"]
    trial.run(chosen)
    assert [(row.peer, row.verdict) for row in trial.rows] == [(None, "")]
    assert not trial.failed


def test_goals_are_those_of_the_largest_size(monkeypatch: pytest.MonkeyPatch):
    """fp32 min/max at 1 GiB: as fast as the peer, 0.9 of reading."""

    def rows(ours: float) -> list[tables.Row]:
        job = cases_of_benchmarks.Job(
            ours=lambda: None,
            peers=(cases_of_benchmarks.Peer("peer", lambda: 0, gpu_cases.MIN_MAX[torch.float32]),),
            ceiling=cases_of_benchmarks.Ceiling("read", torch.ones(1), gpu_cases.MIN_MAX_READ),
        )
        seconds = {"ours": [ours], "peer": [1.0], "ceiling": [0.95]}
        samples = timing.Samples(seconds, [0], 0.0)
        return tables.rows_of("observe/min_max", gpu_cases.LARGEST, 0, job, samples)

    assert [r.verdict for r in rows(0.8)] == ["reach"]
    assert [r.verdict for r in rows(0.97)] == ["met"]
    assert [r.verdict for r in rows(1.5)] == ["not met: ratio, ceiling"]


def test_a_peer_that_does_one_of_100_counts_100_times():
    one = cases_of_benchmarks.Peer("peer", lambda: 0, {}, items=1)
    job = cases_of_benchmarks.Job(ours=lambda: None, peers=(one,), items=100)
    samples = timing.Samples({"ours": [0.5], "peer": [0.25]}, [0], 0.0)
    (row,) = tables.rows_of("kl", 0, 0, job, samples)
    assert row.seconds == 0.005
    assert row.peer is not None
    assert (row.peer.seconds, row.peer.ratio) == (0.25, 50.0)


def test_facts_of_the_machine():
    assert tables.first_line(sys.executable, "-c", "print('one\\ntwo')") == "one"
    assert tables.first_line(sys.executable, "-c", "raise SystemExit(1)") == ""
    assert tables.first_line("no-such-program-anywhere") == ""


def test_rotating_takes_one_after_the_other():
    seen: list[int] = []
    run = gpu_native.rotating([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(7):
        run()
    assert seen == [0, 1, 2, 0, 1, 2, 0]


def test_small_inputs_do_not_fit_the_cache_together():
    for size, dtype in itertools.product((1 << 16, 1 << 20), (torch.float32, torch.float16)):
        buffers = gpu_inputs.ROTATED_BYTES // (size * dtype.itemsize)
        assert buffers * size * dtype.itemsize >= 2 * (60 << 20)
    assert len(gpu_inputs.inputs(CPU, 1 << 20).each) == 2


def test_drift_is_noted():
    before = {"read": 4e12, "copy": 3e12}
    quiet = run_gpu.drift(before, {"read": 3.9e12, "copy": 3e12})
    assert quiet == [
        "ceilings at the beginning and the end: read 4000 then 3900 GB/s, copy 3000 then 3000 GB/s"
    ]
    assert run_gpu.drift(before, {"read": 3e12, "copy": 3e12})[1:] == [
        "DRIFT: the read ceiling changed by 33 %"
    ]


def test_record(on_cpu: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    trial = session(monkeypatch, Counting())
    trial.run(gpu_cases.cases(CPU)[0])
    trial.note("a note")
    about = {"date": "2026-01-31", "device": "NVIDIA Test 9000"}
    chosen = parsed(monkeypatch, "--out", str(tmp_path / "out"))
    monkeypatch.setattr(run_gpu.native, "OUTPUT", tmp_path / "latest")
    run_gpu.write(chosen, (about, trial.rows, trial.notes))
    for folder in ("out", "latest"):
        path = tmp_path / folder / "2026-01-31-nvidia-test-9000"
        record = json.loads(path.with_suffix(".json").read_text())
        assert record["machine"]["device"] == "NVIDIA Test 9000"
        assert record["rows"][0]["case"] == "observe/min_max float32"
        assert record["notes"] == ["a note"]
        text = path.with_suffix(".txt").read_text()
        assert "NVIDIA Test 9000" in text
        assert "torch.aminmax" in text
    assert not (tmp_path / "results").exists()


@pytest.mark.skipif(gpu_native.compiler() is None, reason="nvcc is not installed")
def test_the_ceilings_compile():
    library = gpu_native.build("sm_90")
    names = subprocess.run(["nm", "-D", str(library)], capture_output=True, text=True).stdout
    for function in ("ceiling_read", "ceiling_copy", "ceiling_mix", "cub_histogram", "error_text"):
        assert f"T {function}" in names, function


def test_buffers_that_are_no_multiple_of_a_tile_are_refused():
    with pytest.raises(ValueError, match="expected a multiple of 65536 bytes, got 4"):
        gpu_native.ceilings("read", [torch.ones(1)])
    with pytest.raises(ValueError, match="expected kind to be one of read, copy, 2r1w, got write"):
        gpu_native.ceilings("write", [torch.ones(SIZE)])


def importable(folder: str) -> set[str]:
    """Names of the modules and packages that lie in a folder."""
    modules = {path.stem for path in (ROOT / folder).glob("*.py")} - {"conftest"}
    return modules | {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}


def test_modules_of_different_folders_have_different_names() -> None:
    """Those of the benchmarks, examples, tools and tests are imported in one process here."""
    folders = ("benchmarks", "examples", "tools", "tests", "tests/helpers", "tests/cuda")
    for one, other in itertools.combinations(folders, 2):
        assert not importable(one) & importable(other), (one, other)
