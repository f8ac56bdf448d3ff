"""``torch-ext info``: shows the version, the build, rules and methods."""

from __future__ import annotations

import argparse

from torch_ext import _C
from torch_ext.cli.arguments import Commands, add_command
from torch_ext.cli.terminal import print_json, print_table


def register(commands: Commands) -> None:
    add_command(
        commands, "info", run, "shows the version, the build, rules and methods", "info --json"
    )


def run(arguments: argparse.Namespace) -> int:
    rules = {name: _C.observer_info(name) for name in _C.observers()}
    methods = {name: _C.fake_quant_info(name) for name in _C.fake_quants()}
    build = _C.build_info()
    if arguments.json:
        print_json({**build, "observers": rules, "fake_quants": methods})
        return 0
    for key, value in build.items():
        print(f"{key}: {value}")
    print(f"fake-quants: {', '.join(methods)}\n")
    rows = []
    for name, rule in rules.items():
        options = ", ".join(f"{row['name']} {row['default']}" for row in rule["options"])
        rows.append([name, rule["statistic"], str(rule["max_bits"]), options])
    print_table(("observer", "reads", "bits", "options"), rows)
    return 0
