"""The packages of torch_ext: who may import whom, one name for one thing, private parts private."""

from __future__ import annotations

import ast
import functools
import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import torch_ext
from paths import ROOT

PACKAGE = ROOT / "torch_ext"

# A package, or a module of the top level, and what it may import besides itself and `_C`.
_BELOW_PREPARE = {"utils", "ops", "quantizers", "files"}
ALLOWED: dict[str, set[str]] = {
    "utils": set(),
    "modules": set(),
    "ops": {"utils"},
    "quantizers": {"ops", "utils"},
    "files": {"quantizers", "ops", "utils"},
    "prepare": {"quantizers", "ops", "utils", "modules"},
    "calibration": _BELOW_PREPARE,
    "export": {"files", "quantizers", "ops", "utils"},
    "analysis": {"calibration"} | _BELOW_PREPARE,
    "correction": {"calibration", "prepare"} | _BELOW_PREPARE,
    "pt2e": {"quantizers", "ops", "utils"},
    "cli": {"analysis", "calibration", "export", "prepare"} | _BELOW_PREPARE,
    "__main__": {"cli"},
}
# Inside a package: what a sub-package may take of the modules beside it.
INSIDE: dict[str, set[str]] = {
    "prepare.blocks": {"prepare.qconfig", "prepare.quantizable_modules"},
    "prepare.insertion": {
        "prepare.attach",
        "prepare.blocks",
        "prepare.module_classes",
        "prepare.qconfig",
        "prepare.quantizable_modules",
    },
    "quantizers.parts": {"quantizers.solve"},
    "prepare.batch_norms": {"prepare.insertion", "prepare.module_classes"},
    "export.common": set(),
    "export.engines": {"export.common"},
    "export.programs": {"export.common"},
    "export.tensorrt": {"export.common", "export.onnx_grid"},
    "correction.widths": set(),
    "correction.equalization": set(),
    "correction.walk": set(),
    "correction.biases": {"correction.walk"},
    "correction.rounding": {"correction.biases", "correction.walk"},
    "analysis.report": {"analysis.rule_choices", "analysis.svg"},
}


def modules() -> dict[str, Path]:
    """Every Python module of the package, as ``files.storage``; a package as ``files``."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """The modules of the package that a module imports, also inside functions."""
    tree = ast.parse(MODULES[name].read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: relative import"
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for path in paths:
            if path.startswith("torch_ext."):
                own = path.removeprefix("torch_ext.")
                while own and own not in MODULES and own != "_C":
                    own = own.rpartition(".")[0]
                found.add(own)
    return found - {""}


IMPORTS = {name: imported(name) for name in MODULES}


@pytest.mark.parametrize("name", [name for name in MODULES if name != "__init__"])
def test_imports_go_downward(name: str) -> None:
    room = name.partition(".")[0]
    for other in IMPORTS[name]:
        below = other.partition(".")[0]
        assert below == room or below in {"_C", *ALLOWED[room]}, f"{name} imports {other}"


@pytest.mark.parametrize("folder", INSIDE)
def test_a_package_in_a_package_takes_what_it_may(folder: str) -> None:
    room = folder.partition(".")[0]
    for name in MODULES:
        if name != folder and not name.startswith(f"{folder}."):
            continue
        for other in IMPORTS[name]:
            inside = other.startswith(f"{room}.") and not f"{other}.".startswith(f"{folder}.")
            known = any(f"{other}.".startswith(f"{taken}.") for taken in INSIDE[folder])
            assert not inside or known, f"{name} imports {other}"


def test_every_room_is_in_the_table() -> None:
    rooms = {name.partition(".")[0] for name in MODULES} - {"__init__"}
    assert rooms == ALLOWED.keys()


def test_no_module_imports_itself_by_way_of_others() -> None:
    finished: set[str] = set()

    def visit(name: str, path: list[str]) -> None:
        assert name not in path, " -> ".join([*path, name])
        if name not in finished:
            for other in sorted(IMPORTS.get(name, ())):
                visit(other, [*path, name])
            finished.add(name)

    for name in MODULES:
        # A package's own __init__ runs before its modules, so it may import them.
        if MODULES[name].name != "__init__.py":
            visit(name, [])


def test_no_folder_is_crowded() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        entries = [
            p for p in folder.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
        ]
        named = ("__init__.py", "__main__.py")  # by Python
        assert len([p for p in entries if p.name not in named]) <= 12, folder


def walk() -> Iterator[ModuleType]:
    for info in pkgutil.walk_packages(torch_ext.__path__, "torch_ext."):
        apart = ("torch_ext.__main__", "torch_ext.libtorch_ext", "torch_ext.pt2e")
        if not info.name.startswith(apart):  # pt2e needs torchao
            yield importlib.import_module(info.name)


def test_no_function_hides_a_module() -> None:
    for module in walk():
        parent, _, name = module.__name__.rpartition(".")
        holder = importlib.import_module(parent)
        assert getattr(holder, name) is module, f"{module.__name__} is hidden"


def definitions(private: bool) -> dict[str, list[str]]:
    """Where each class and function of the top level of a module is defined."""
    found: dict[str, list[str]] = {}
    for name, path in MODULES.items():
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            if node.name.startswith("_") == private and not node.name.startswith("__"):
                found.setdefault(node.name, []).append(name)
    return found


def test_a_name_means_one_thing() -> None:
    twice = {name: where for name, where in definitions(private=False).items() if len(where) > 1}
    # A command of the command line is named after the function that it calls.
    shared = {"register": "cli.", "run": "cli."}
    for name, where in twice.items():
        prefix = shared.get(name, "\0")
        assert all(place.startswith(prefix) for place in where), f"{name}: {where}"


def test_private_classes_are_named_once() -> None:
    for name, where in definitions(private=True).items():
        if name[1].isupper():
            assert len(where) == 1, f"{name}: {where}"


@functools.cache
def private_attributes() -> set[str]:
    """Names that a class of the package gives its own private attributes and methods."""
    found = set()
    for path in MODULES.values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.FunctionDef):
                        found.add(inner.name)
                    if isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                        found.add(inner.attr)
    torchs = {"_modules", "_parameters", "_buffers", "_forward_hooks", "_metadata"}
    return {n for n in found if n.startswith("_") and not n.startswith("__")} - torchs


@pytest.mark.parametrize("name", MODULES)
def test_no_module_reaches_into_another_ones_private_parts(name: str) -> None:
    private = private_attributes()
    tree = ast.parse(MODULES[name].read_text())
    own = {
        *(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and _is_self(n.value)),
        *(n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)),
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("torch_ext"):
            taken = [a.name for a in node.names if a.name.startswith("_") and a.name != "_C"]
            assert not taken, f"{name}: {taken} of {node.module}"
        if isinstance(node, ast.Attribute) and node.attr in private and node.attr not in own:
            raise AssertionError(f"{name}:{node.lineno}: .{node.attr}")


def _is_self(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")
