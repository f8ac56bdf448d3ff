"""What type checkers know of the registry is what the registry has."""

from __future__ import annotations

import subprocess
import sys

import typing_stubs
from paths import ROOT


def test_the_files_are_those_that_the_tool_writes() -> None:
    for path, text in typing_stubs.files().items():
        assert path.read_text() == text, f"{path}: run python tools/typing_stubs.py"


def test_check_fails_for_a_stale_file_and_names_it() -> None:
    path = ROOT / "torch_ext" / "ops" / "registry_names.py"
    program = f"""
import sys; sys.path.insert(0, {str(ROOT / "tools")!r})
import typing_stubs
files = typing_stubs.files()
typing_stubs.files = lambda: {{path: text + "#" for path, text in files.items()}}
sys.exit(typing_stubs.main(["--check"]))
"""
    before = path.read_text()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "torch_ext/ops/registry_names.py: run python tools/typing_stubs.py" in done.stderr
    assert path.read_text() == before
