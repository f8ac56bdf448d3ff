"""Arguments that several commands share: parsers, patterns, output files, numbers."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_ext.utils.arguments import bounded

Commands = Any  # the type that ``add_subparsers`` returns, which argparse does not name publicly

_SUFFIXES = ("", ".safetensors")


def add_command(
    commands: Commands,
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
    example: str,
) -> argparse.ArgumentParser:
    """Adds a command and returns its parser, which has ``--json``.

    Args:
        commands: the result of ``add_subparsers``.
        name: the command.
        run: runs the command on the parsed arguments and returns the exit code.
        text: what the command does, for the help; begins with a small letter.
        example: arguments of ``torch-ext`` to show in the help.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=f"example:\n  torch-ext {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")


def add_pattern(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pattern",
        action="append",
        metavar="NAMES",
        help='only quantizers of these names, such as "layer1.*"; may be repeated',
    )


def add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def progress_of(arguments: argparse.Namespace) -> bool | None:
    """The argument ``progress``: False with ``--quiet``, else None for a bar on a terminal."""
    return False if arguments.quiet else None


def check_output(path: str | None) -> None:
    """Raises ValueError for an ``--output`` that has another suffix than .safetensors."""
    if path is not None and Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"expected --output to end in .safetensors, got {bounded(path)}")


def count(text: str) -> int:
    """Parses an integer of 1 or more, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def tolerance(text: str) -> float:
    """Parses a number of 0 or more, for argparse."""
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value
