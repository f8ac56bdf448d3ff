"""Writes what type checkers know of the registry: names, and the functions of the rules.

    python tools/typing_stubs.py           # after a change to csrc/registry.h and a build
    python tools/typing_stubs.py --check   # exit status 1 where a file is not what it should be

The package finds rules in the registry when it runs; these files only let a checker reject
``ops.percentyle`` and ``Observer("kll")``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch_ext
from torch_ext import _C

ROOT = Path(__file__).resolve().parents[1]
_MADE_BY = "tools/typing_stubs.py writes this file from the registry."


def _literal(name: str, values: Sequence[str]) -> str:
    quoted = ", ".join(f'"{value}"' for value in values)
    line = f"{name} = Literal[{quoted}]"
    if len(line) <= 100:
        return line
    rows = "".join(f'    "{value}",\n' for value in values)
    return f"{name} = Literal[\n{rows}]"


def _choices_of(rule: str, row: _C.OptionInfo) -> str:
    """The name of an option's choices: ``KlVariant``."""
    return f"{rule}_{row['name']}".title().replace("_", "")


def _rule_stub(rule: str) -> str:
    options = [
        f"    {row['name']}: {_choices_of(rule, row) if row['choices'] else 'float'} = ...,\n"
        for row in _C.observer_info(rule)["options"]
    ]
    star = ["    *,\n"] if options else []
    return (
        f"def {rule}(\n    x: Tensor,\n    quant_min: int = ...,\n    quant_max: int = ...,\n"
        "    symmetric: bool = ...,\n    ch_axis: int = ...,\n    grid: str | None = ...,\n"
        f"{''.join([*star, *options])}) -> Tensor: ...\n"
    )


def files() -> dict[Path, str]:
    """The text of each file."""
    rules, methods = torch_ext.observers(), torch_ext.fake_quants()
    learned = [method for method in methods if _C.fake_quant_info(method)["learned"]]
    options = [(rule, row) for rule in rules for row in _C.observer_info(rule)["options"]]
    chosen = [(rule, row) for rule, row in options if row["choices"]]
    names = "\n".join(
        [
            f'"""Names of the registry, for type checkers.\n\n{_MADE_BY}\n"""\n',
            "from typing import Literal\n",
            _literal("Rule", rules),
            _literal("Method", methods),
            _literal("LearnedMethod", learned),
            *(_literal(_choices_of(rule, row), row["choices"]) for rule, row in chosen),
            "",
        ]
    )
    known = ", ".join(_choices_of(rule, row) for rule, row in chosen)
    imports = [f"from torch_ext.ops.registry_names import {known}\n"]
    for name in torch_ext.ops.__all__:
        home = getattr(torch_ext.ops, name).__module__
        imports.append(f"from {home} import {name} as {name}\n")
    stub = f"# {_MADE_BY}\n\nfrom torch import Tensor\n\n{''.join(sorted(imports))}\n"
    stub += "".join(_rule_stub(rule) for rule in rules)
    folder = ROOT / "torch_ext" / "ops"
    return {folder / "registry_names.py": names, folder / "__init__.pyi": stub}


def main(arguments: Sequence[str]) -> int:
    """Exit status 2 for unknown arguments."""
    if unknown := [argument for argument in arguments if argument != "--check"]:
        print(f"typing_stubs.py: unknown {' '.join(unknown)}; known: --check", file=sys.stderr)
        return 2
    wanted = files()
    stale = [path for path in wanted if not path.is_file() or path.read_text() != wanted[path]]
    for path in stale:
        if arguments:
            print(f"{path.relative_to(ROOT)}: run python tools/typing_stubs.py", file=sys.stderr)
        else:
            path.write_text(wanted[path])
            print(path.relative_to(ROOT))
    return int(bool(arguments and stale))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
