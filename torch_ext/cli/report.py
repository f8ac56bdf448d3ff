"""``torch-ext report``: writes an HTML page about every quantizer of a file."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch_ext.analysis.report.report import report
from torch_ext.cli.arguments import Commands, add_command, add_file, add_quiet, progress_of
from torch_ext.cli.terminal import print_summary

_PAGES = (".html", ".htm")


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "report",
        run,
        "writes an HTML page about every quantizer, with pictures and findings",
        "report net.safetensors -o report.html",
    )
    add_file(parser)
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    if (suffix := Path(arguments.output).suffix.lower()) not in _PAGES:
        raise ValueError(
            f"expected --output to end in {' or '.join(_PAGES)}, got {suffix or 'no suffix'!r}"
        )
    summary = report(arguments.file, arguments.output, progress=progress_of(arguments))
    print_summary(summary, arguments.json)
    return 0
