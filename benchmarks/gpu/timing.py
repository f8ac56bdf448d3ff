"""Timing on a CUDA device: what the host does counts only where the device waits for it."""

from __future__ import annotations

import torch

from timing import Run, Sampler

# Keeps the device busy while the first calls are enqueued: some 50 microseconds.
HEAD_START = 100_000  # clock cycles


def by_events(device: torch.device) -> Sampler:
    """Seconds per call between two events on the current stream."""

    def sample(run: Run, repeats: int) -> float:
        begin = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        torch.cuda._sleep(HEAD_START)
        begin.record()
        for _ in range(repeats):
            run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / repeats

    return sample
