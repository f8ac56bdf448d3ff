"""``torch-ext show``: shows the quantizers of a file."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from typing import Any

from torch_ext.cli.arguments import Commands, add_command, add_file, add_pattern
from torch_ext.cli.terminal import print_json, print_table, range_text, zero_point_text
from torch_ext.files.quantizer_params import params_of
from torch_ext.files.saved_quantizers import SavedQuantizers, read_quantizers
from torch_ext.prepare.describe import describe
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel, role_of
from torch_ext.quantizers.solve import findings
from torch_ext.utils.text import label_of


def register(commands: Commands) -> None:
    parser = add_command(
        commands, "show", run, "shows the quantizers of a file", "show net.safetensors"
    )
    add_file(parser)
    add_pattern(parser)


def run(arguments: argparse.Namespace) -> int:
    model = read_quantizers(arguments.file)
    print_quantizers(arguments, model, PreparedModel("show", model).select(arguments.pattern))
    return 0


def print_quantizers(
    arguments: argparse.Namespace, model: SavedQuantizers, chosen: Mapping[str, FakeQuantize]
) -> None:
    """Prints quantizers of a file as a table or as JSON, and notes about suspicious ones.

    `model` is the file's contents and `chosen` the quantizers to print; ``arguments.json`` and
    ``arguments.file`` are used.
    """
    solved = {
        name: (quantizer.observer, quantizer.range)
        for name, quantizer in chosen.items()
        if bool(quantizer.solved)
    }
    notes = [note.strip() for note in findings(solved)]
    if arguments.json:
        quantizers = {name: _record(name, quantizer) for name, quantizer in chosen.items()}
        print_json({"file": os.fspath(arguments.file), "quantizers": quantizers, "notes": notes})
        return
    rows = []
    for row in describe(model).quantizers:
        if row.name not in chosen:
            continue
        params = params_of(chosen[row.name])
        finite, _, _, infinite, nan = params["observer.tally"].sum(0).tolist()
        rows.append(
            [
                *(label_of(row.name), row.of, row.observer, row.grid),
                *(range_text(params), row.scale, zero_point_text(params)),
                *(str(finite), f"{infinite}, {nan}" if infinite or nan else ""),
            ]
        )
    header = ("quantizer", "of", "observer", "grid", "range", "scale", "zero point")
    print_table((*header, "values", "inf, nan"), rows)
    for note in notes:
        print(f"note: {note}")


def _record(name: str, quantizer: FakeQuantize) -> dict[str, Any]:
    """A quantizer for ``--json``."""
    params = params_of(quantizer)
    finite, zeros, tiny, infinite, nan = params["observer.tally"].sum(0).tolist()
    extrema = params["observer.extrema"]
    return {
        "of": role_of(name, quantizer),
        **params.spec,
        "solved": params.solved,
        "synced": params.synced,
        **{field: params[field].tolist() for field in ("range", "scale", "zero_point")},
        "values": {
            "finite": finite,
            "zeros": zeros,
            "tiny": tiny,
            "infinite": infinite,
            "nan": nan,
            "minimum": float(extrema[:, 0].min()),
            "maximum": float(extrema[:, 1].max()),
        },
    }
