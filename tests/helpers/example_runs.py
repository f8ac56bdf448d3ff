"""Examples and benchmarks as programs, started in the repository's folder."""

from __future__ import annotations

import os
import subprocess
import sys

from paths import ROOT


def run_example(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
