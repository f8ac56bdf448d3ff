"""torch_ext.ops as a Python module, and what importing it says when it cannot work."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import torch_ext
from torch_ext import _C, ops
from torch_ext.ops import loader
from torch_ext.ops.registry import encode_options

PACKAGE = Path(torch_ext.__file__).parent
FUNCTIONS = [
    ops.fake_quant,
    ops.lsq,
    ops.pact,
    ops.learned_fake_quant,
    ops.observe_,
    ops.merge_,
    ops.solve,
    ops.solve_many,
    ops.qparams,
    ops.follow_,
    ops.follow_fake_quant,
    ops.kl_threshold,
    ops.gptq,
]

GRID = ("quant_min", "quant_max", "symmetric", "scale_rule", "power_of_two", "rounding")


@pytest.mark.parametrize("rule", torch_ext.observers())
def test_every_rule_is_a_function_with_its_options(rule: str) -> None:
    function = getattr(ops, rule)
    assert function is getattr(ops, rule)
    assert rule in dir(ops)
    shown = inspect.signature(function).parameters
    assert list(shown)[:5] == ["x", "quant_min", "quant_max", "symmetric", "ch_axis"]
    for row in _C.observer_info(rule)["options"]:
        assert shown[row["name"]].default == row["default"]
        assert row["name"] in function.__doc__
    assert f"csrc/observers/{rule}.h" in function.__doc__
    x = torch.randn(100)
    assert function(x).shape == (1, 2)
    with pytest.raises(ValueError, match=f'{rule}: unknown option "levels"; known: '):
        function(x, levels=3)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)
def test_every_function_is_documented_and_is_a_registered_op(
    function: Callable[..., object],
) -> None:
    assert function.__doc__
    schema = getattr(torch.ops.torch_ext, function.__name__).default._schema
    # What makes up a grid is one argument of the op, where the first of them is.
    grid = "grids" if function is ops.solve_many else "grid"
    names = [grid if n in GRID else n for n in inspect.signature(function).parameters]
    assert [a.name for a in schema.arguments if a.name != "options"] == [
        name for name in dict.fromkeys(names) if name != "options"
    ]


def test_other_names_are_missing_as_usual() -> None:
    with pytest.raises(AttributeError, match=r"module 'torch_ext\.ops' has no attribute 'nope'"):
        ops.nope  # noqa: B018


def test_options_as_names_and_as_numbers() -> None:
    assert encode_options("clip", {"xmax": 2}) == [-1.0, 2.0]
    assert encode_options("clip", [-3.0, 2.0]) == [-3.0, 2.0]
    assert encode_options("clip", []) == [-1.0, 1.0]
    variants = _C.observer_info("kl")["options"][0]["choices"]
    for index, name in enumerate(variants):
        assert encode_options("kl", {"variant": name}) == [index]
        assert encode_options("kl", [index]) == [index]
    with pytest.raises(ValueError, match="clip: expected options to be 2 numbers, got 1"):
        encode_options("clip", [1.0])
    with pytest.raises(ValueError, match="percentile: expected percentile to be between"):
        encode_options("percentile", [200.0])
    with pytest.raises(ValueError, match="solve_many: expected options to be 1 entries, got 2"):
        ops.solve_many(["min_max"], [], [], [], [], [], [], options=[{}, {}])


def test_loading_again_does_nothing() -> None:
    assert loader.load() is loader.NATIVE
    assert torch.equal(ops.min_max(torch.tensor([1.0, 2.0])), torch.tensor([[1.0, 2.0]]))


@pytest.mark.parametrize(
    ("missing", "text"),
    [
        ("all", "the extension module torch_ext._C cannot be imported"),
        ("ops", "the op library libtorch_ext.so is missing"),
        ("other torch", "built for torch 2.1.0+cpu, but torch"),
        ("damaged", "the op library libtorch_ext.so cannot be loaded"),
    ],
)
def test_a_package_that_cannot_work_says_why(missing: str, text: str, tmp_path: Path) -> None:
    copy = tmp_path / "torch_ext"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("*.so", "include", "share"))
    extension = next(PACKAGE.glob("_C.*.so"))
    if missing in ("ops", "damaged"):
        shutil.copy(extension, copy)
    if missing == "other torch":
        (copy / "_C.py").write_text("def build_info(): return {'torch': '2.1.0+cpu'}\n")
    if missing == "damaged":
        (copy / "libtorch_ext.so").write_bytes(b"\x7fELF" + bytes(100))
    # An editable install would find the extension module that the copy lacks.
    alone = "sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in str(f).lower()]"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; {alone}; import torch_ext"],
        cwd=tmp_path, env={"PATH": ""}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"ImportError: torch_ext: {text}" in done.stderr
    assert str(copy) in done.stderr
    assert "pip install -e . --no-build-isolation" in done.stderr
