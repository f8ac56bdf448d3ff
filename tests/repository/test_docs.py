"""The guide: every page's snippets run, in order, its tables are those of the code, every public
name is in the API reference, and it builds without a warning."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import os
import re
import socket
import subprocess
import sys
import typing
from pathlib import Path
from types import ModuleType

import pytest

import torch_ext
from paths import ROOT
from torch_ext import _C

DOCS = ROOT / "docs"
PAGES = sorted(str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md"))
# Above a block that cannot run.
NOT_RUN = re.compile(r"<!-- not run: \S.*-->")


def text_of(page: str) -> str:
    return (DOCS / f"{page}.md").read_text()


def snippets(page: str) -> str:
    """The page's Python blocks as one program, each line at its place in the page."""
    lines, runs, previous = [], False, ""
    for line in text_of(page).splitlines():
        if line.startswith("```"):
            runs = line == "```python" and not NOT_RUN.fullmatch(previous)
            lines.append("")
        else:
            lines.append(line if runs else "")
        previous = line
    return "\n".join(lines)


def table(page: str, header: str) -> dict[str, list[str]]:
    """The rows of the table that begins with `header`, by their first cell without backticks."""
    text = text_of(page)
    lines = text[text.index(header) :].split("\n\n")[0].splitlines()[2:]
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    return {row[0].strip(" `"): [cell.strip() for cell in row[1:]] for row in rows}


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.mark.parametrize("page", [page for page in PAGES if snippets(page).strip()])
def test_snippets_run(page: str, tmp_path: Path) -> None:
    program = f"exec(compile({snippets(page)!r}, {page + '.md'!r}, 'exec'))"
    # What torchrun sets for a single process.
    ranks = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        env=os.environ | ranks | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_a_block_runs_unless_it_says_why_not() -> None:
    """A comment without a reason does not count."""
    for page in PAGES:
        for line in text_of(page).splitlines():
            assert not line.startswith("<!-- not run") or NOT_RUN.fullmatch(line), (page, line)


def test_every_page_is_in_the_contents() -> None:
    trees = re.findall(r"```\{toctree\}\n(.*?)```", text_of("index"), re.DOTALL)
    lines = "\n".join(trees).splitlines()
    names = [line for line in lines if line and not line.startswith(":")]
    assert sorted([*names, "index"]) == PAGES


def test_pages_include_no_other_file() -> None:
    for page in PAGES:
        assert "{include}" not in text_of(page), page


def test_rules_and_their_defaults() -> None:
    rows = table("guides/observers", "| rule |")
    assert tuple(rows) == torch_ext.observers()
    for rule, cells in rows.items():
        shown = dict(re.findall(r"`(\w+)` (\S+?)(?:,|\s|$)", cells[-1]))
        have = {o["name"]: o["default"] for o in _C.observer_info(rule)["options"]}
        assert shown.keys() == have.keys(), rule
        for name, default in have.items():
            assert shown[name] == default or float(shown[name]) == default, (rule, name)


def test_methods() -> None:
    rows = table("tutorials/training", "| method |")
    assert tuple(rows) == torch_ext.fake_quants()
    for method, cells in rows.items():
        parameter = _C.fake_quant_info(method)["parameter"]
        assert f"`{parameter}`" in cells[0] if parameter else "nothing" in cells[0], method


def test_states() -> None:
    rows = table("guides/workflow", "| state |")
    names = {re.findall(r"\w+", name)[0] for name in rows}
    assert names == {state.name for state in torch_ext.FakeQuantState}


def test_calls_of_the_workflow_exist() -> None:
    rows = text_of("guides/workflow").split("| step | call |")[1].split("\n\n")[0].splitlines()[2:]
    calls = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[2])]
    assert len(calls) > 20
    assert set(calls) <= set(torch_ext.__all__)


def test_formats() -> None:
    """Every writer and reader of the package, and no other, is in the table of formats."""
    rows = table("tutorials/export", "| format |")
    shown = {name for cells in rows.values() for name in re.findall(r"`export\.(\w+)`", cells[0])}
    functions = {
        n for n in torch_ext.export.__all__ if inspect.isfunction(vars(torch_ext.export)[n])
    }
    assert shown == functions


def test_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_ext", "--help"],
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    commands = re.findall(r"^    (\w+) +\w", done.stdout, re.MULTILINE)
    assert "merge" in commands
    assert [row.split()[1] for row in table("reference/command_line", "| command |")] == commands


def test_targets_and_variables_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert phony
    shown = re.findall(r"make ([\w-]+)", " ".join(table("reference/building", "| target |")))
    assert set(shown) == set(phony[1].split()) - {"setup"}
    documented = set(re.findall(r"^#   (\w+)=", makefile, re.MULTILINE)) | {"OUT"}
    rows = " ".join(table("reference/building", "| variable |"))
    assert set(re.findall(r"\b([A-Z_]+)=", rows)) == documented


def reference() -> dict[str, str]:
    """Names in the API reference, with the text that follows those written by hand."""
    names: dict[str, str] = {}
    for match in re.finditer(
        r"^\.\. (auto|py:)\w+:: ([\w.]+)(.*?)(?=^\S|\Z)",
        text_of("reference/api"),
        re.DOTALL | re.MULTILINE,
    ):
        names[match[2].removeprefix("torch_ext.")] = "" if match[1] == "auto" else match[3]
    return names


def public_names(module: ModuleType) -> list[str]:
    """``__all__``, or else the functions that the module defines."""
    if hasattr(module, "__all__"):
        return list(module.__all__)
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_"
    ]


API = [
    *((torch_ext, n) for n in torch_ext.__all__ if not inspect.ismodule(getattr(torch_ext, n))),
    *((torch_ext.export, n) for n in torch_ext.export.__all__),
    *((torch_ext.ops, n) for n in dict.fromkeys((*public_names(torch_ext.ops), *_C.observers()))),
]


def label(module: ModuleType, name: str) -> str:
    return f"{module.__name__}.{name}".removeprefix("torch_ext.")


@pytest.mark.parametrize(("module", "name"), API, ids=[label(*entry) for entry in API])
def test_a_public_name_is_in_the_reference(module: ModuleType, name: str) -> None:
    known = reference()
    wanted = label(module, name)
    assert wanted in known, f"docs/reference/api.md lacks torch_ext.{wanted}"
    value = getattr(module, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert value.__doc__, f"torch_ext.{wanted} has no docstring"
        # A dataclass without a docstring gets its signature as one.
        assert not value.__doc__.startswith(f"{name}("), f"torch_ext.{wanted} has no docstring"
    else:  # a constant, or a function of the native module: described in the page
        assert re.search(r"^   [A-Z]", known[wanted], re.MULTILINE), wanted


def test_ops_has_public_functions() -> None:
    assert {"fake_quant", "observe_", "solve_many"} <= set(public_names(torch_ext.ops))


def test_pt2e_is_in_the_reference() -> None:
    pytest.importorskip("torchao", reason="torch_ext.pt2e needs torchao")
    pt2e = importlib.import_module("torch_ext.pt2e")
    assert {f"pt2e.{name}" for name in pt2e.__all__} <= reference().keys()


def row_type(result: type, field: str) -> type:
    """The class of a result's entries: `field` is a collection of them."""
    hint = typing.get_type_hints(result)[field]
    kinds = [kind for kind in typing.get_args(hint) if dataclasses.is_dataclass(kind)]
    assert len(kinds) == 1
    return typing.cast(type, kinds[0])


def test_fields_that_the_page_lists_by_hand() -> None:
    """Results and rows that have no public name yet."""
    description = typing.get_type_hints(torch_ext.describe)["return"]
    kinds = {
        "Description": description,
        "QuantizerRow": row_type(description, "quantizers"),
        "QuantizerSummary": row_type(torch_ext.CalibrationSummary, "quantizers"),
        "SweepRow": row_type(torch_ext.Sweep, "rows"),
        "SensitivityRow": row_type(torch_ext.Sensitivity, "rows"),
    }
    known = reference()
    for name, kind in kinds.items():
        assert kind.__name__ == name
        if known[name]:  # else it is documented from the code
            shown = re.findall(r"py:attribute:: (\w+)", known[name])
            assert shown == [field.name for field in dataclasses.fields(kind)], name


def test_it_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("sphinx", reason="needs Sphinx: run `make test`")
    build = [sys.executable, "-m", "sphinx", "-W", "-q", "-b", "html", DOCS, tmp_path]
    done = subprocess.run(
        build,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "reference" / "api.html").read_text()
    for name in ("FakeQuantize", "prepare_qat", "quantization_parameters", "fake_quant_spec"):
        assert f"{name}</span>" in page
    # A docstring, a signature made from the registry, and a page's own text have arrived.
    for text in ("Runs in eval mode", "99.99", "The folder of the CMake package"):
        assert text in page
