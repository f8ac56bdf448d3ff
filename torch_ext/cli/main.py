"""``torch-ext``, or ``python -m torch_ext``: parses and runs a command, and sets the exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from torch_ext._C import build_info
from torch_ext.cli import check, compare, convert, info, merge, report, show, solve

_COMMANDS = (info, show, solve, compare, merge, convert, report, check)
_EXITS = """exit status:
  0  done
  1  compare: the files differ by more than --tolerance
     check: an engine computes a layer in float, or does not load the file
  2  bad input or usage; nothing was written
"""
_PIPE_CLOSED, _INTERRUPTED = 141, 130  # the codes that shells use for SIGPIPE and SIGINT


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code; errors are printed to standard error.

    Args:
        argv: the arguments after the program's name; by default those of the process.
    """
    with contextlib.suppress(AttributeError):  # only text files can be reconfigured
        sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as stop:  # argparse printed the help or a usage error
        return stop.code if isinstance(stop.code, int) else 0
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # The reader closed the pipe. Python flushes at exit, which must not raise again.
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
        description="Shows, solves, compares, joins and converts files of save_observer_params, "
        "and checks ONNX files.",
        epilog=_EXITS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=build_info()["version"])
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in _COMMANDS:
        command.register(commands)
    return parser
