"""Faults of the device: an exception each time, from the op that was called next at the latest."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from op_samples import SAMPLES

PROGRAM = Path(__file__).with_name("faults.py")
PUBLIC = {"_fake_quant_forward": "fake_quant"}


def run(fault: str) -> dict[str, str]:
    done = subprocess.run(
        [sys.executable, str(PROGRAM), fault], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"not an exception but an end: {done.returncode}\n{done.stderr}"
    lines = [line.partition(":") for line in done.stdout.splitlines()]
    return {name: text.strip() for name, _, text in lines}


@pytest.mark.parametrize("fault", ["torch", "ours"])
def test_a_fault_is_never_swallowed(fault: str, device: torch.device):
    if device.type != "cuda":
        pytest.skip("needs a device that can fault")
    found = run(fault)
    for op in SAMPLES:
        assert found[f"before {op}"] == "", op
    assert found["sound"] == ""
    assert "CUDA" in found["wait"], found
    for op in SAMPLES:
        text = found[f"after {op}"]
        assert "CUDA" in text, (op, text)
    named = [op for op in SAMPLES if f"{PUBLIC.get(op, op)}: " in found[f"after {op}"]]
    assert {"observe_", "merge_"} <= set(named), found
    assert "CUDA" in found["wait again"]
