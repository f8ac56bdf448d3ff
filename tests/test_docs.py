"""The guide: every page's snippets run, in order, and it builds without a warning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(page.stem for page in DOCS.glob("*.md"))


def snippets(page: str) -> str:
    """The page's Python blocks as one program, each line at its place in the page."""
    lines, inside = [], False
    for line in (DOCS / f"{page}.md").read_text().splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            lines.append("")
        else:
            lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page).strip()])
def test_snippets_run(page: str, tmp_path: Path) -> None:
    program = f"exec(compile({snippets(page)!r}, {page + '.md'!r}, 'exec'))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_contents() -> None:
    listed = re.search(r"```\{toctree\}\n(.*?)```", (DOCS / "index.md").read_text(), re.DOTALL)
    assert listed
    names = [line for line in listed[1].splitlines() if line and not line.startswith(":")]
    assert sorted([*names, "index"]) == PAGES


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs Sphinx: run `make test`")
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, tmp_path]
    done = subprocess.run(
        build,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "api.html").read_text()
    for name in ("FakeQuantize", "prepare_qat", "quantization_parameters", "fake_quant_spec"):
        assert f"{name}</span>" in page
    # What the README and the guide share has arrived.
    assert "mean_abs" in (tmp_path / "observers.html").read_text()
