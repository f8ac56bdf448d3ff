"""Statistics of several processes merged on the device: they leave the bits of one process."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ranks import jobs, processes


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_merged_statistics_are_those_of_one_process(device: torch.device, backend: str) -> None:
    """With NCCL a rank needs a GPU of its own: on one GPU there is one rank."""
    world = 2
    if backend == "nccl":
        if device.type != "cuda":
            pytest.skip("NCCL is for CUDA devices")
        world = min(2, torch.cuda.device_count())
    want = {kind: jobs.plain(jobs.fill(jobs.bank(), jobs.pieces(kind))) for kind in jobs.DEALS}
    for found in processes.run(world, jobs.merge_on, str(device), backend=backend, seconds=120):
        assert found.keys() == want.keys()
        for kind, values in found.items():
            for key, value in want[kind].items():
                if isinstance(value, np.ndarray):
                    assert values[key].tobytes() == value.tobytes(), (kind, key)
                else:
                    assert values[key] == value, (kind, key)
