"""Runs a page in headless Chromium: its document after scripts ran, and a picture of it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "google-chrome")
OFFLINE = ["--disable-background-networking", "--disable-component-update", "--no-first-run"]


def browser() -> str:
    """Its path; the test is skipped where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed (apt install chromium)")
    return found


def run_page(page: Path, script: str, screenshot: Path, width: int = 1500) -> str:
    """The document, as HTML, after `script` has run in a copy of the page."""
    copy = page.with_name("scripted.html")
    text = page.read_text(encoding="utf-8")
    copy.write_text(
        text.replace("</body>", f"<script>{{{script}}}</script></body>"), encoding="utf-8"
    )
    command = [
        browser(),
        "--headless",
        "--no-sandbox",  # as root there is none
        "--disable-gpu",
        "--hide-scrollbars",
        *OFFLINE,
        f"--user-data-dir={page.parent / 'profile'}",
        f"--window-size={width},2400",
        f"--screenshot={screenshot}",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return done.stdout.decode()
