"""benchmarks/formats.py: its formats against plain formulas, its transformer, and one small run."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import formats as program
from agreement import formats, sentences
from agreement.formats import FORMATS, weight_on_grid
from agreement.nets import DRAWS, Sizes
from agreement.scores import Outcome
from paths import ROOT

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: Tensor, magnitudes: Tensor) -> Tensor:
    """The nearest of the numbers of either sign; for values of which none is a tie."""
    numbers = torch.cat([-magnitudes.flip(0), magnitudes])
    return numbers[(x[..., None] - numbers).abs().argmin(-1)]


def weight(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def row(values: list[float], size: int = 32) -> Tensor:
    return torch.tensor([values + [0.0] * (size - len(values))])


@pytest.mark.parametrize(
    ("name", "given", "want"),
    [
        # 7 is from 4 to 8, and 4 is the largest power of two of E2M1: scale 1, and 6 saturates.
        ("MXFP4, floor", [7.0, 0.6, -2.6], [6.0, 0.5, -3.0]),
        # 7 / 6 rounded up to a power of two is 2; 3.5 is halfway, and 4 has the even mantissa.
        ("MXFP4, ceil", [7.0, 0.6, -2.6], [8.0, 1.0, -3.0]),
        # 481 is from 256 to 512, as is 448: scale 1, saturated; rounded up, the scale is 2.
        ("MXFP8 E4M3, floor", [481.0, 17.0], [448.0, 16.0]),
        ("MXFP8 E4M3, ceil", [481.0, 17.0], [480.0, 16.0]),
        # k / 64 times 2 to the exponent of the largest.
        ("MXINT8", [1.9, 0.016, -1.999], [122 / 64, 1 / 64, -127 / 64]),
        ("MXINT8", [3.0, 0.016], [3.0, 1 / 32]),
        # 7.9 is below 8 and above 7.5, which E2M3 ends with.
        ("MXFP6 E2M3, floor", [7.9, 0.13], [7.5, 0.125]),
        # 63 is from 32 to 64 and the largest power of two of E3M2 is 16: scale 2, and 28 saturates.
        ("MXFP6 E3M2, floor", [63.0, 8.9], [56.0, 8.0]),
        ("MXFP4, floor", [], []),
    ],
)
def test_blocks_by_hand(name: str, given: list[float], want: list[float]) -> None:
    assert torch.equal(weight_on_grid(row(given), FORMATS[name]), row(want))


def test_nvfp4_is_two_scales() -> None:
    x = weight(8, 64)
    have = weight_on_grid(x, FORMATS["NVFP4"])
    whole = x.abs().max() / (448 * 6)
    for i, block in enumerate(x.reshape(-1, 16)):
        eighth = (block.abs().max() / 6 / whole).clamp(2.0**-6, 448).to(torch.float8_e4m3fn)
        scale = eighth.float() * whole
        want = nearest((block / scale).clamp(-6, 6), E2M1) * scale
        assert torch.equal(have.reshape(-1, 16)[i], want)


@pytest.mark.parametrize(
    ("kind", "dtype", "largest"),
    [("E4M3", torch.float8_e4m3fn, 448.0), ("E5M2", torch.float8_e5m2, 57344.0)],
)
def test_fp8_is_torchs_cast(kind: str, dtype: torch.dtype, largest: float) -> None:
    x = weight(6, 3, 3, 3)
    for share, tops in (
        ("channel", x.abs().amax((1, 2, 3), keepdim=True)),
        ("tensor", x.abs().amax()),
    ):
        scale = (tops.double() / largest).float()
        want = (x / scale).clamp(-largest, largest).to(dtype).float() * scale
        assert torch.equal(weight_on_grid(x, FORMATS[f"FP8 {kind} per {share}"]), want)


@pytest.mark.parametrize("size", [16, 32])
def test_groups_are_inputs_of_an_output_side_by_side(size: int) -> None:
    """The last group of an output may be short, and takes no value of the next output."""
    x = weight(4, 10, 3, 1)
    have = weight_on_grid(x, FORMATS[f"int4, groups of {size}"])
    for out in range(4):
        order = [(i, k) for k in range(3) for i in range(10)]
        for start in range(0, 30, size):
            places = order[start : start + size]
            values = [float(x[out, i, k, 0]) for i, k in places]
            scale = torch.tensor(2 * max(map(abs, values)) / 15, dtype=torch.float32)
            for (i, k), value in zip(places, values, strict=True):
                want = (torch.tensor(value) / scale).round().clamp(-8, 7) * scale
                assert have[out, i, k, 0] == want


def test_noise_of_integers_is_that_of_a_uniform_error() -> None:
    net = nn.Sequential(nn.Linear(400, 300), nn.Flatten(), nn.Linear(300, 10))
    with torch.no_grad():
        net[0].weight.copy_(weight(300, 400))
    found = formats.noise(net, FORMATS["int8 per tensor"])
    assert list(found) == ["0", "2"]
    values = net[0].weight.detach().double()
    scale, power = float(values.abs().max()) / 127, float(values.square().mean())
    assert found["0"] == pytest.approx(10 * math.log10(power / (scale**2 / 12)), abs=0.1)


def test_weights_are_copied_and_only_they_change() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    model = formats.with_weights(net, FORMATS["int4 per channel"])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    changed = {n for n, value in model.state_dict().items() if not torch.equal(before[n], value)}
    assert changed == {"0.weight", "3.weight"}
    assert all(len(channel.unique()) <= 16 for channel in model[0].weight)


@pytest.fixture
def linear() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(32, 4, bias=False)).eval()
    with torch.no_grad():
        net[0].weight.copy_(weight(4, 32))
    return net


def read(linear: nn.Sequential, name: str, seen: Tensor, x: Tensor) -> Tensor:
    """What the layer makes of x, float weights, inputs in a format."""
    found = formats.observe(linear, lambda net: net(seen))
    formats.quantize_inputs(linear, FORMATS[name], found)
    with torch.no_grad():
        return linear(x)


def test_inputs_of_groups_are_scaled_by_their_own_values(linear: nn.Sequential) -> None:
    x = 100 * weight(8, 32)
    have = read(linear, "MXFP4, ceil", weight(8, 32), x)
    scale = (x.abs().amax(1, keepdim=True) / 6).log2().ceil().exp2()
    want = nearest(x / scale, E2M1) * scale
    assert torch.equal(have, nn.functional.linear(want, linear[0].weight))


def test_inputs_of_a_token_share_a_scale(linear: nn.Sequential) -> None:
    x = weight(8, 32)
    have = read(linear, "FP8 E4M3 per channel, per token", x, x)
    scale = (x.abs().amax(1, keepdim=True).double() / 448).float()
    want = (x / scale).to(torch.float8_e4m3fn).float() * scale
    assert torch.equal(have, nn.functional.linear(want, linear[0].weight))


def test_inputs_of_a_tensor_keep_the_calibrated_range(linear: nn.Sequential) -> None:
    x = weight(64, 32)
    have = read(linear, "int8 per channel", x, 100 * x)
    most = nn.functional.linear(100 * x, linear[0].weight).abs().max()
    assert have.abs().max() < most / 10  # saturated at the range of x


def test_channels_of_an_image_are_its_groups() -> None:
    net = nn.Sequential(nn.Conv2d(32, 4, 1, bias=False)).eval()
    x = weight(2, 32, 3, 3)
    found = formats.observe(net, lambda model: model(x))
    formats.quantize_inputs(net, FORMATS["MXFP8 E4M3, ceil"], found)
    scale = (x.abs().amax(1, keepdim=True) / 448).log2().ceil().exp2()
    want = (x / scale).to(torch.float8_e4m3fn).float() * scale
    with torch.no_grad():
        have = net(x)
        assert torch.equal(have, nn.functional.conv2d(want, net[0].weight))


# MiniLM -------------------------------------------------------------------------------------------


def test_a_layer_is_torchs_encoder_layer() -> None:
    torch.manual_seed(0)
    ours = sentences.Layer().eval()
    peer = nn.TransformerEncoderLayer(
        sentences.WIDTH, sentences.HEADS, 4 * sentences.WIDTH, 0.0, "gelu", 1e-12, batch_first=True
    ).eval()
    parts = [getattr(ours, name) for name in ("query", "key", "value")]
    state = {
        "self_attn.in_proj_weight": torch.cat([part.weight for part in parts]),
        "self_attn.in_proj_bias": torch.cat([part.bias for part in parts]),
    }
    names = {"mixed": "self_attn.out_proj", "wide": "linear1", "narrow": "linear2"}
    for own, name in {**names, "mixed_norm": "norm1", "norm": "norm2"}.items():
        state |= {f"{name}.{n}": p for n, p in getattr(ours, own).named_parameters()}
    peer.load_state_dict(state)
    x = weight(3, 7, sentences.WIDTH)
    mask = torch.arange(7) < torch.tensor([[7], [4], [1]])
    with torch.no_grad():
        have, want = ours(x, mask), peer(x, src_key_padding_mask=~mask)
    torch.testing.assert_close(have[mask], want[mask], rtol=1e-5, atol=1e-5)


def test_paragraphs_are_prose_and_none_comes_twice() -> None:
    long = "A sentence that is repeated until there is enough of it. " * 3
    blocks = [long, f"   {long}", f"{long}x ::= y", f"{long.strip()}\nand more", long]
    text = "\n\n".join(["Head\n****", *blocks])
    assert sentences.prose(text) == [long.strip(), f"{long.strip()} and more"]
    found = [text for texts in sentences.paragraphs().values() for text in texts]
    assert len(set(found)) == len(found) > 300


@pytest.mark.skipif(bool(sentences.NET.why_not()), reason=sentences.NET.why_not())
def test_minilm_finds_the_topic() -> None:
    net = sentences.finder().eval()
    names = list(sentences.paragraphs())
    questions = {
        "anonymous functions in a single expression": "lambda",
        "a mapping of keys to arbitrary objects": "typesmapping",
        "entry points of the interactive debugger": "debugger",
        "deletion of names, attributes and slices": "del",
    }
    with torch.no_grad():
        found = net(sentences.tokens(list(questions))).argmax(1)
    assert [names[i] for i in found] == list(questions.values())


@pytest.mark.skipif(bool(sentences.NET.why_not()), reason=sentences.NET.why_not())
def test_no_topic_is_tested_by_the_draw_that_calibrates_with_it() -> None:
    tested: set[tuple[int, ...]] = set()
    for number in range(DRAWS):
        made = sentences.draw(number, Sizes(1000, 1000))
        new, seen = set(map(tuple, made.test.tolist())), set(map(tuple, made.calibration.tolist()))
        assert len(new) > 100
        assert not new & seen
        assert not new & tested
        tested |= new


# The program --------------------------------------------------------------------------------------


def test_tables_and_records_hold_what_was_found() -> None:
    good = Outcome([True] * 4, [], [0.0] * 4, [1.0] * 4, 1.0, 0.0)
    bad = Outcome([False] * 4, [], [4.0] * 4, [1.0] * 4, 1.0, 0.0)
    made = program.Row("net", "NVFP4", {"a": 20.0, "b": 10.0, "c": 30.0})
    made.found = {program.WEIGHTS: [good] * 3, program.BOTH: [bad] * 3}
    line = program.table([made]).splitlines()[2]
    assert line == (
        "| NVFP4 | 4.5 | 20.0; 10.0 | 1.000 (1.000-1.000); 0.000 | 0.000 (0.000-0.000); 2.000 |"
    )
    (entry,) = program.record([made])
    assert (entry["sqnr_median"], entry["sqnr_worst"], entry["worst_layer"]) == (20.0, 10.0, "b")
    assert entry["weights_and_inputs"]["logit_error"]["value"] == 2.0
    assert entry["weights"]["inputs"] == 12


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "formats.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)


def test_a_small_run() -> None:
    done = run("--quick", "--nets", "example", "--formats", "NVFP4", "int8 per channel*")
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ")[0] for line in done.stdout.splitlines() if line.startswith("| ")]
    assert rows == ["| format", "| int8 per channel", "| NVFP4"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--formats", "nothing"], "expected a net and a format that run here"),
        (["--nets", "none"], "invalid choice"),
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
