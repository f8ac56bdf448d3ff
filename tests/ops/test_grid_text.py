"""A grid as one text: what Python writes, what ops read, and how they refuse the rest."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import torch_ext
from torch_ext import ops
from torch_ext.ops.grid_text import grid_text

NATIVE = torch.ops.torch_ext
WORDS = '[quant_min,quant_max] or a float format (float8_e4m3, float8_e5m2, float6_e2m3, \
float6_e3m2, float4_e2m1) and words among symmetric, affine, scale_rule=, power_of_two, \
scale_dtype=, rounding=, each kind once, such as "[-128,127] symmetric"'


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ((-128, 127), "[-128,127]"),
        ((-127, 127, True), "[-127,127] symmetric"),
        ((0, 255, False), "[0,255] affine"),
        ((-8, 7, True, "tvm", True), "[-8,7] symmetric scale_rule=tvm power_of_two"),
        (
            (0, 15, False, "grid", True, "floor_half_up"),
            "[0,15] affine power_of_two rounding=floor_half_up",
        ),
        ((np.int64(-8), torch.tensor(7), np.bool_(True), "grid", 0), "[-8,7] symmetric"),
    ],
)
def test_python_writes(given: Any, text: str):
    assert grid_text(*given) == text


def test_one_argument_in_every_schema():
    """What makes up a grid is in no other argument, so that another kind of grid changes none."""
    grids = 0
    for op in {*ops.__all__, *torch_ext.observers(), *_internal()}:
        arguments = {a.name: str(a.type) for a in getattr(NATIVE, op).default._schema.arguments}
        assert not arguments.keys() & {"quant_min", "quant_max", "symmetric", "rounding"}, op
        assert not arguments.keys() & {"scale_rule", "power_of_two"}, op
        types = [t for name, t in arguments.items() if name in ("grid", "grids")]
        assert types in ([], ["List[str]" if op == "solve_many" else "str"]), op
        grids += len(types)
    without = {"observe_", "merge_", "kl_threshold", "_fake_quant_backward"}
    assert grids == len({*ops.__all__, *torch_ext.observers(), *_internal()} - without)


def _internal() -> list[str]:
    names = torch._C._dispatch_get_all_op_names()
    return [n.removeprefix("torch_ext::") for n in names if n.startswith("torch_ext::_")]


def test_words_in_any_order():
    words = ["symmetric", "scale_rule=tvm", "power_of_two", "rounding=half_away"]
    range_ = torch.tensor([[-1.0, 3.0]])
    want = ops.qparams(range_, -8, 7, True, "tvm", True)
    assert want[0].item() == 0.5  # 3 / 2^3, up to a power of two
    for order in itertools.permutations(words):
        have = NATIVE.qparams(range_, " ".join(["[-8,7]", *order]))
        assert all(map(torch.equal, have, want))


def test_every_op_takes_the_text_of_a_quantizer():
    """Each reads the words that concern it."""
    text = "[-8,7] symmetric scale_rule=tvm power_of_two rounding=half_away"
    x = torch.tensor([0.25, -0.25, 0.75, 3.0])
    scale, zero_point = NATIVE.qparams(NATIVE.min_max(x, text), text)
    out = NATIVE.fake_quant(x, scale, zero_point, text)
    assert out.tolist() == [0.5, -0.5, 1.0, 3.0]  # halves away from zero
    range_, solved = torch.zeros(1, 2), torch.zeros(1, dtype=torch.uint8)
    buffers = (range_, scale.clone(), zero_point.clone(), solved)
    followed = NATIVE.follow_fake_quant(x, *buffers, 1.0, "min_max", text)
    assert torch.equal(followed, out)
    assert torch.equal(buffers[1], scale)


def test_defaults_are_those_words():
    x = torch.randn(100)
    range_ = NATIVE.mse(x, "[-128,127] symmetric")
    assert torch.equal(range_, NATIVE.mse(x))
    assert torch.equal(range_, NATIVE.mse(x, "[-128,127] symmetric scale_rule=grid"))
    s, z = NATIVE.qparams(range_, "[-128,127] symmetric")
    default, even = "[-128,127]", "[-128,127] rounding=half_even"
    assert torch.equal(NATIVE.fake_quant(x, s, z, default), NATIVE.fake_quant(x, s, z, even))


REFUSED = {
    "": f'expected grid to be {WORDS}, got nothing in grid ""',
    "[-8,7": f'expected grid to be {WORDS}, got 7 in grid "[-8,7"',
    "[-8,x] symmetric": f'expected grid to be {WORDS}, got x] symmetric in grid "[-8,x] symmetric"',
    "[-8,7] symmetrical": f'expected grid to be {WORDS}, got symmetrical in grid '
    '"[-8,7] symmetrical"',
    "[-8,7] affine symmetric": f'expected grid to be {WORDS}, got symmetric in grid '
    '"[-8,7] affine symmetric"',
    "[-8,7]": 'expected grid to be symmetric or affine, got neither in grid "[-8,7]"',
    "[5,7] affine": 'expected quant_min to be between -32768 and 0, got 5 in grid "[5,7] affine"',
    "[-8,-9] affine": 'expected quant_max to be between 0 and 65535, got -9 in grid '
    '"[-8,-9] affine"',
    "[-8,65530] affine": 'expected quant_max to be at most quant_min + 65535, got 65530 in grid '
    '"[-8,65530] affine"',
    "[-8,7] symmetric scale_rule=max": 'expected scale_rule to be one of grid, tvm, floor, even, '
    'got max in grid "[-8,7] symmetric scale_rule=max"',
    "[-8,7] affine scale_rule=tvm": 'expected scale_rule to be grid on an affine grid, got tvm in '
    'grid "[-8,7] affine scale_rule=tvm"',
    "[-8,7] affine rounding=up": 'expected rounding to be one of half_even, half_away, '
    'floor_half_up, got up in grid "[-8,7] affine rounding=up"',
}  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_errors_name_op_argument_and_value(text: str, device: str):
    assert _refusal(lambda: NATIVE.min_max(torch.ones(3, device=device), text)) == (
        f"min_max: {REFUSED[text]}"
    )
    state = [torch.zeros(1, n, device=device) for n in (2, 5)]
    counts = torch.zeros(1, 2, 0, 0, dtype=torch.int64, device=device)
    lists = [[state[0]] * 2, [state[1].long()] * 2, [counts] * 2]
    call = lambda: NATIVE.solve_many(["min_max"] * 2, *lists, ["[-8,7] affine", text], [])  # noqa: E731
    assert _refusal(call) == f"solve_many: {REFUSED[text].replace(' in grid ', ' in grids[1] ')}"


def _refusal(call: Callable[[], object]) -> str:
    with pytest.raises(RuntimeError) as raised:
        call()
    return str(raised.value).splitlines()[0]


def test_a_long_text_is_cut_in_the_error():
    text = _refusal(lambda: NATIVE.min_max(torch.ones(3), "[-8,7] " + "x" * 10**6))
    assert len(text) < 600
    assert text.endswith('x..."')
    text = _refusal(lambda: NATIVE.min_max(torch.ones(3), "[-8,7] x" + "\u20ac" * 100))
    assert text.endswith('\u20ac..."')


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"quant_min": -8.0}, '"[-8.0,7] symmetric"'),
        ({"quant_max": "7"}, "\"[-8,'7'] symmetric\""),
        ({"quant_max": None}, '"[-8,None] symmetric"'),
        ({"quant_max": 2**70}, f'"[-8,{2**70}] symmetric"'),
        ({"symmetric": "yes"}, "symmetric='yes' in grid"),
        ({"symmetric": 2}, "symmetric=2 in grid"),
        ({"symmetric": None}, "symmetric or affine, got neither"),
        ({"scale_rule": "max"}, "scale_rule to be one of grid, tvm, floor, even, got max in grid"),
        ({"scale_rule": ""}, "scale_rule to be one of grid, tvm, floor, even, got  in grid"),
        ({"power_of_two": "no"}, "power_of_two='no' in grid"),
    ],
)
def test_python_arguments_of_another_type_are_refused(wrong: dict[str, Any], said: str):
    given: dict[str, Any] = {"quant_min": -8, "quant_max": 7, "symmetric": True} | wrong
    text = _refusal(lambda: ops.qparams(torch.zeros(1, 2), **given))
    assert text.startswith("qparams: expected ")
    assert said in text


def test_lists_of_other_lengths_are_refused():
    statistic = ([torch.zeros(1, 2)], [torch.zeros(1, 5, dtype=torch.int64)])
    counts = [torch.zeros(1, 2, 0, 0, dtype=torch.int64)]
    grid: dict[str, Any] = {"quant_min": [-8], "quant_max": [7], "symmetric": [True]}
    grid |= {"scale_rule": ["grid"], "power_of_two": [False]}
    for name, entries in grid.items():
        wrong = grid | {name: entries * 2}
        with pytest.raises(ValueError, match=f"solve_many: expected {name} to be 1 entries, got 2"):
            ops.solve_many(["min_max"], *statistic, counts, **wrong)


def test_compiled_with_a_grid_that_varies():
    """The compiler traces the second value of an integer as a symbol; the text has its digits."""
    x, range_ = torch.randn(50) * 9, torch.tensor([[-5.0, 9.0]])

    def quantized(x: Tensor, top: int, symmetric: bool) -> Tensor:
        qparams = ops.qparams(range_, -top, top, symmetric)
        return ops.fake_quant(x, *qparams, -top, top, rounding="half_away")

    compiled = torch.compile(quantized, fullgraph=True, backend="aot_eager")
    for top, symmetric in itertools.product((3, 7, 5), (True, False)):
        assert torch.equal(compiled(x, top, symmetric), quantized(x, top, symmetric))


class Quantizing(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Buffer(torch.tensor([0.5, 0.25, 1.0]))
        self.zero_point = torch.nn.Buffer(torch.tensor([1, 0, 3], dtype=torch.int32))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        rounding: Any = "floor_half_up"
        out = ops.fake_quant(x, self.scale, self.zero_point, 0, 15, 1, "paper", rounding)
        range_ = ops.percentile(out, 0, 15, False, 1, percentile=90)
        return (out, *ops.qparams(range_, 0, 15, False, power_of_two=True))


def test_exported_and_saved(tmp_path: Path):
    x, module = torch.randn(4, 3, 5), Quantizing()
    program = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    called = [n for n in program.graph.nodes if "torch_ext" in str(n.target)]
    texts = [next(a for a in n.args if isinstance(a, str) and a[0] == "[") for n in called]
    assert texts == [
        "[0,15] rounding=floor_half_up",
        "[0,15] affine",
        "[0,15] affine power_of_two",
    ]
    torch.export.save(program, tmp_path / "quantizing.pt2")
    loaded = torch.export.load(tmp_path / "quantizing.pt2").module()
    longer = torch.randn(6, 3, 5)
    for have, want in zip(loaded(longer), module(longer), strict=True):
        assert torch.equal(have, want)
