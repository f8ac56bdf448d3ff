"""The command line: ``python -m torch_ext``, or ``torch-ext``."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Sequence

import torch_ext
from torch_ext import _C, _commands
from torch_ext.export.tensorrt.cache import ALGORITHMS

_EXITS = """exit status:
  0  done
  1  compare: the files differ by more than --tolerance
  2  bad input or usage; nothing was written
"""
_PIPE_CLOSED, _INTERRUPTED = 141, 130  # as shells report SIGPIPE and SIGINT

Command = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand and returns its exit code; errors go to standard error."""
    with contextlib.suppress(AttributeError):  # a stream that is not a text file's
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # help was asked for, or is needed
        return stop.code if isinstance(stop.code, int) else 0
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What reads the output is done with it; nothing more must reach it at exit.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except (OSError, ValueError, TypeError, RuntimeError, ImportError, MemoryError) as error:
        text = str(error) or type(error).__name__
        print(f"torch-ext {arguments.command}: {text}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torch-ext",
        description="Looks at, solves, joins and converts files of save_observer_params.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=torch_ext.__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, run: Command, text: str, example: str) -> argparse.ArgumentParser:
        made = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}.",
            epilog=f"example:\n  torch-ext {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        made.add_argument("--json", action="store_true", help="print JSON")
        made.set_defaults(run=run)
        return made

    add("info", _commands.info, "shows the version, the build, rules and methods", "info --json")
    _add_show(add("show", _commands.show, "shows the quantizers of a file", "show net.safetensors"))
    _add_solve(
        add(
            "solve",
            _commands.solve,
            "solves activations again from their statistics, by another rule or other options",
            "solve net.safetensors --observer percentile --percentile 99.9 -o new.safetensors",
        )
    )
    _add_compare(
        add(
            "compare",
            _commands.compare_files,
            "shows ranges and scales of two files side by side, the largest difference first",
            "compare a.safetensors b.safetensors --tolerance 0.01",
        )
    )
    _add_merge(
        add(
            "merge",
            _commands.merge,
            "joins the files of several machines in that of one run over all their data",
            "merge a.safetensors b.safetensors -o all.safetensors",
        )
    )
    _add_convert(
        add(
            "convert",
            _commands.convert,
            "writes a file for an inference engine",
            "convert net.safetensors --to tensorrt-cache --version 8.6.1 -o net.cache",
        )
    )
    _add_report(
        add(
            "report",
            _commands.write_report,
            "writes an HTML page about every quantizer, with pictures and findings",
            "report net.safetensors -o report.html",
        )
    )
    return parser


def _add_pattern(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--pattern",
        action="append",
        metavar="NAMES",
        help='only quantizers of these names, such as "layer1.*"; may be repeated',
    )


def _add_quiet(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress bar")


def _add_show(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    _add_pattern(parser)


def _add_solve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    rules = torch_ext.observers()
    parser.add_argument(
        "--observer",
        metavar="RULE",
        help=f"by default each quantizer's own; one of {', '.join(rules)}",
    )
    _add_pattern(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="by default nothing is written")
    group = parser.add_argument_group("options of rules")
    seen: dict[str, list[str]] = {}
    rows = [(rule, row) for rule in rules for row in _C.observer_info(rule)["options"]]
    for rule, row in rows:
        seen.setdefault(row["name"], []).append(rule)
    for name, owners in seen.items():
        choices = [c for _, row in rows if row["name"] == name for c in row["choices"]]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"{_commands.OPTION}{name}",
            type=str if choices else float,
            choices=choices or None,
            metavar=None if choices else "NUMBER",
            help=f"of {', '.join(owners)}",
        )


def _add_compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A")
    parser.add_argument("b", metavar="B")
    parser.add_argument("--top", type=_count, metavar="N", help="only the N that differ most")
    parser.add_argument(
        "--tolerance",
        type=_tolerance,
        metavar="X",
        help="exit with 1 if a range or scale differs by more, relatively, or the names do",
    )


def _add_merge(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    _add_quiet(parser)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--to", required=True, choices=_commands.FORMATS)
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument(
        "--without",
        action="append",
        metavar="NAMES",
        help="leaves out the quantizers of these names; may be repeated",
    )
    group = parser.add_argument_group("for tensorrt-cache")
    group.add_argument("--version", help="of the TensorRT that will read it, such as 8.6.1")
    group.add_argument("--algorithm", choices=ALGORITHMS)
    group.add_argument(
        "--names",
        metavar="FILE",
        help="JSON: the network's tensor, or a list of them, for each quantizer",
    )
    parser.add_argument_group("for ncnn").add_argument(
        "--layers",
        metavar="FILE",
        help='JSON: for each layer of the network {"weight": QUANTIZER, "input": QUANTIZER}, and '
        '"groups" of a convolution if there are several',
    )


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    _add_quiet(parser)


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _tolerance(text: str) -> float:
    value = float(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main())
