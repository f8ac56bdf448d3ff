"""A calibration that is killed again and again ends with the bits of one that never was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from paths import ROOT

KILLS = 20
SCRIPT = ROOT / "tests/helpers/killed_calibrations.py"


def test_twenty_kills_at_random_moments(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), str(tmp_path), str(KILLS), "3"]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    found = json.loads(done.stdout)
    assert [kill["killed"] for kill in found["kills"]] == [True] * KILLS
    assert any(kill["checkpoint"] for kill in found["kills"])
    assert 0 < found["resumed_from"] < 400
    assert found["equal"]
    assert found["left"] == []
    # Partial files of killed writers do not pile up: the next one removes them.
    assert max(kill["partial"] for kill in found["kills"]) <= 1
