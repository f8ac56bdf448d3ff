"""``torch-ext merge``: joins the files of several machines."""

from __future__ import annotations

import argparse

from torch_ext.cli.arguments import Commands, add_command, add_quiet, check_output, progress_of
from torch_ext.cli.terminal import print_summary
from torch_ext.files.merge import merge_observer_params


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "merge",
        run,
        "joins the files of several machines into one, as of one run over all their data",
        "merge a.safetensors b.safetensors -o all.safetensors",
    )
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    add_quiet(parser)


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments.output)
    report = merge_observer_params(arguments.files, arguments.output, progress_of(arguments))
    print_summary(report, arguments.json)
    return 0
