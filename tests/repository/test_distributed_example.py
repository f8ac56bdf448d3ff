"""examples/calibrate_distributed.py and benchmarks/scaling.py, as torchrun starts them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import calibrate_distributed
import torch_ext
from common import data as example_data
from example_runs import run_example

SCRIPT = "examples/calibrate_distributed.py"
BENCHMARK = "benchmarks/scaling.py"


def run_distributed(script: str, *arguments: str) -> str:
    """With what `torchrun` runs, on a free port; what it prints."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = run_example(*launcher, script, "--quick", *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_it_finds_what_one_process_finds(tmp_path: Path) -> None:
    text = run_distributed(SCRIPT, "--output", str(tmp_path / "new"))
    assert re.search(r"all \d\d\d tensors are bit for bit what one process finds", text)
    assert sorted(re.findall(r"rank \d: \d of 4 batches", text)) == [
        "rank 0: 2 of 4 batches",
        "rank 1: 2 of 4 batches",
    ]
    data = example_data.load()
    model = calibrate_distributed.prepared(data.name, data.train_images[:1])
    torch_ext.load_observer_params(tmp_path / "new" / "calibration.safetensors", model)


def test_a_rank_may_see_nothing(tmp_path: Path) -> None:
    text = run_distributed(SCRIPT, "--output", str(tmp_path), "--batch", "256")
    assert "rank 1: 0 of 1 batches" in text
    assert "bit for bit what one process finds" in text


def test_a_difference_is_named() -> None:
    left, right = (
        calibrate_distributed.prepared("digits", torch.zeros(1, 1, 28, 28)) for _ in range(2)
    )
    assert calibrate_distributed.differing(left, right) == []
    name = "stem.2.activation_quantizer.observer.tally"
    right.state_dict()[name][0, 4] += 1
    assert calibrate_distributed.differing(left, right) == [name]


def test_the_benchmark_measures_both() -> None:
    text = run_distributed(BENCHMARK)
    number = r"[0-9.e+]+"
    assert re.search(rf"sync_observers: 14 quantizers, 3.5 MiB +2 +{number} ms", text)
    assert re.search(rf"calibrate: 256 images +1 +{number} /s", text)
    assert re.search(rf"calibrate \+ sync_observers +2 +{number} /s", text)


@pytest.mark.parametrize("script", [SCRIPT, BENCHMARK])
def test_it_says_how_it_is_started(script: str) -> None:
    done = run_example(script)
    assert done.returncode == 2
    assert f"start it as torchrun --nproc-per-node 2 {script}" in done.stderr
