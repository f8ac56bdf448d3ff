"""What was measured, a file for each recipe on each draw, so that a run goes on where it stopped.

Files are kept under a digest of the code that made them: a changed library measures anew, while
the rivals' results stay.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import torch_ext
from agreement.scores import Outcome

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parent / "output" / "accuracy"


class Store:
    """The folder of a run's results.

    Args:
        sizes: what the results depend on beside the code.
        recipes: the files that say what is measured with the library.
    """

    def __init__(self, sizes: str, recipes: Iterable[Path] = (HERE / "ours.py",)) -> None:
        inputs = [
            HERE / "nets.py",
            HERE / "grids.py",
            HERE / "scores.py",
            HERE.parent / "trained_net.py",
        ]
        package = Path(torch_ext.__file__).parent
        library = [*package.rglob("*.py"), *package.glob("*.so")]
        self._ours = FOLDER / f"ours-{_digest(sizes, [*inputs, *library, *recipes])}"
        self._rivals = FOLDER / f"rivals-{_digest(sizes, [*inputs, HERE / 'rivals.py'])}"

    def path(self, name: str, *, rival: bool) -> Path:
        """The file of a name, in a folder that exists."""
        path = (self._rivals if rival else self._ours) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read(self, name: str, *, rival: bool) -> Outcome | None:
        path = self.path(f"{name}.json", rival=rival)
        return Outcome(**json.loads(path.read_text())) if path.exists() else None

    def write(self, name: str, found: Outcome, *, rival: bool) -> None:
        path = self.path(f"{name}.json", rival=rival)
        partial = _partial(path)
        partial.write_text(json.dumps(asdict(found)))
        partial.replace(path)

    def logits(self, name: str) -> Tensor | None:
        """The float net's logits of a draw, if a run has stored them."""
        path = self.path(f"{name}.pt", rival=True)
        return torch.load(path) if path.exists() else None

    def keep_logits(self, name: str, values: Tensor) -> None:
        path = self.path(f"{name}.pt", rival=True)
        partial = _partial(path)
        torch.save(values, partial)
        partial.replace(path)


def _partial(path: Path) -> Path:
    """Where a file grows: another process may be writing the same one."""
    return path.with_suffix(f".{os.getpid()}.partial")


def _digest(sizes: str, paths: Iterable[Path]) -> str:
    found = hashlib.sha256(sizes.encode())
    for path in sorted(paths):
        found.update(path.name.encode())
        found.update(path.read_bytes())
    return found.hexdigest()[:16]
