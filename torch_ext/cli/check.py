"""``torch-ext check``: shows which layers of an ONNX file engines compute in integers."""

from __future__ import annotations

import argparse

from torch_ext.cli.arguments import Commands, add_command, add_file, count, tolerance
from torch_ext.cli.terminal import print_json, print_table
from torch_ext.export.engines.check import ExportCheck, check


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "check",
        run,
        "shows which layers of an ONNX file run in integers, which in float and why, and how fast",
        "check net.onnx --engine onnxruntime",
    )
    add_file(parser)
    parser.add_argument(
        "--engine",
        action="append",
        metavar="NAME",
        help="onnxruntime or openvino; may be repeated; by default those that are installed",
    )
    parser.add_argument(
        "--batch",
        type=count,
        default=1,
        metavar="N",
        help="the size of inputs' first axis, where the file leaves it open; by default 1",
    )
    parser.add_argument(
        "--shape",
        action="append",
        type=_shape,
        default=[],
        metavar="NAME=SIZES",
        help="an input's whole shape, such as x=1,3,224,224; may be repeated",
    )
    parser.add_argument(
        "--threads", type=count, default=1, metavar="N", help="of the engine; by default 1"
    )
    parser.add_argument(
        "--seconds",
        type=tolerance,
        default=2.0,
        metavar="X",
        help="about how long each engine is timed, by default 2; 0 does not time",
    )


def run(arguments: argparse.Namespace) -> int:
    found = check(
        arguments.file,
        engines=arguments.engine,
        batch=arguments.batch,
        shapes=dict(arguments.shape),
        threads=arguments.threads,
        seconds=arguments.seconds,
    )
    if arguments.json:
        print_json(_record(found))
    else:
        _print(found)
    return 0 if found.all_integer else 1


def _print(found: ExportCheck) -> None:
    for engine in found.engines:
        print(engine.summary())
        if engine.layers:
            print_table(*engine.table())
            print()
    for note in found.notes:
        print(f"note: {note}")


def _record(found: ExportCheck) -> dict[str, object]:
    """The check for ``--json``."""
    return {
        "file": found.path,
        "all_integer": found.all_integer,
        "engines": [
            {
                "engine": engine.engine,
                "version": engine.version,
                "problem": engine.problem,
                "integer": len(engine.integer),
                "int8_ms": engine.int8_ms,
                "float_ms": engine.float_ms,
                "speedup": engine.speedup,
                "layers": [vars(layer) for layer in engine.layers],
            }
            for engine in found.engines
        ],
        "notes": found.notes,
    }


def _shape(text: str) -> tuple[str, list[int]]:
    """Parses NAME=SIZES, for argparse."""
    name, equals, sizes = text.rpartition("=")
    try:
        shape = [int(size) for size in sizes.split(",")]
    except ValueError:
        shape = []
    if not equals or not name or not shape or min(shape) < 1:
        raise argparse.ArgumentTypeError(f"expected NAME=SIZES, such as x=1,3,224,224, got {text}")
    return name, shape
