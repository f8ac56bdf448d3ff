"""``torch-ext solve``: solves the ranges of activations again, from the statistics of a file."""

from __future__ import annotations

import argparse
import glob

from torch_ext import _C
from torch_ext.calibration.resolve import resolve
from torch_ext.cli.arguments import Commands, add_command, add_file, add_pattern, check_output
from torch_ext.cli.show import print_quantizers
from torch_ext.files.observer_params import save_observer_params
from torch_ext.files.saved_quantizers import read_quantizers
from torch_ext.quantizers.find import PreparedModel

_OPTION = "option_"  # prefix of rules' options among the parsed arguments


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "solve",
        run,
        "solves activations again from their statistics, by another rule or other options",
        "solve net.safetensors --observer percentile --percentile 99.9 -o new.safetensors",
    )
    add_file(parser)
    rules = _C.observers()
    parser.add_argument(
        "--observer",
        metavar="RULE",
        help=f"by default each quantizer's own; one of {', '.join(rules)}",
    )
    add_pattern(parser)
    parser.add_argument("-o", "--output", metavar="FILE", help="by default nothing is written")
    group = parser.add_argument_group("options of rules")
    rows = [(rule, row) for rule in rules for row in _C.observer_info(rule)["options"]]
    owners: dict[str, list[str]] = {}
    for rule, row in rows:
        owners.setdefault(row["name"], []).append(rule)
    for name, option_rules in owners.items():
        choices = [choice for _, row in rows if row["name"] == name for choice in row["choices"]]
        group.add_argument(
            f"--{name.replace('_', '-')}",
            dest=f"{_OPTION}{name}",
            type=str if choices else float,
            choices=choices or None,
            metavar=None if choices else "NUMBER",
            help=f"of {', '.join(option_rules)}",
        )


def run(arguments: argparse.Namespace) -> int:
    check_output(arguments.output)
    model = read_quantizers(arguments.file)
    chosen = PreparedModel("solve", model).select(arguments.pattern)
    activations = [name for name, quantizer in chosen.items() if not quantizer.transient]
    if not activations:
        raise ValueError(
            "solve: expected quantizers of activations, got weights alone, which a file does not "
            "hold: call resolve(model, weight_observer=...) on the model"
        )
    options = {
        name.removeprefix(_OPTION): value
        for name, value in vars(arguments).items()
        if name.startswith(_OPTION) and value is not None
    }
    resolve(model, arguments.observer, pattern=list(map(glob.escape, activations)), **options)
    if arguments.output is not None:
        save_observer_params(model, arguments.output)
    print_quantizers(arguments, model, {name: chosen[name] for name in activations})
    return 0
