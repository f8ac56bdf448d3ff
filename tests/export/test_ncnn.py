"""ncnn's calibration table: run by ncnn, its reader, refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import export_models
from failing_writes import check_failing_writes
from nets import ncnn_net
from nets.tiny_net import images, tiny_net
from torch_ext import (
    QConfig,
    export,
    get_default_qconfig,
    named_quantizers,
    prepare_qat,
    set_fake_quantize,
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.table"


def test_ncnn_computes_what_validation_does(path: Path) -> None:
    """With its sums in int32; only a value within rounding of a tie may fall on another level."""
    net = ncnn_net.net()
    report = export.ncnn_table(net, ncnn_net.images(), path)
    assert set(report.quantizers) == set(named_quantizers(net))
    assert report.left_out == {}
    x = ncnn_net.images(32, 7)
    have = ncnn_net.run(net, path, x)
    with torch.no_grad():
        want = net(x)
        set_fake_quantize(net, "float")
        floating = net(x)
    near = (have - want).abs() < 1e-5 * want.abs().max()
    assert float(near.all(1).float().mean()) > 0.9  # of the images
    worst = float((have - want).abs().max())
    assert worst < 0.2 * float((floating - want).abs().max())


def test_the_rows(path: Path) -> None:
    net = ncnn_net.net()
    export.ncnn_table(net, ncnn_net.images(), path)
    lines = path.read_text().splitlines()
    keys = [line.split(" ")[0] for line in lines]
    assert keys == [f"{name}_param_0" for name in ncnn_net.LAYERS] + list(ncnn_net.LAYERS)
    read = export.read_ncnn_table(path)
    weight = net.pointwise.parametrizations.weight.original
    largest = weight.abs().amax((1, 2, 3))
    assert torch.tensor(read.weights["pointwise_param_0"]).allclose(127 / largest, rtol=3e-7)
    scale = net.input_quantizers.x.scale
    assert read.activations["conv"] == tuple((1 / scale.double()).float().tolist())
    assert "e" not in "".join(line.partition(" ")[2] for line in lines)


def test_names_and_quantizers_that_no_layer_reads(path: Path) -> None:
    """Placed by modules: operands of sums, and the input of a layer with a float weight."""
    net = tiny_net().eval()
    net.qconfig = get_default_qconfig(
        activation_qkwargs=export_models.NARROW, weight_qkwargs=export_models.NARROW
    )
    set_aside = QConfig(activation=net.qconfig.activation, weight=None)
    net = export_models.run(prepare_qat(net, mapping={"fc": set_aside}), images())
    report = export.ncnn_table(net, images(), path, {"conv1": "conv_0", "conv2": "dw_1"})
    read = export.read_ncnn_table(path)
    assert list(read.weights) == ["conv_0_param_0", "dw_1_param_0"]
    assert read.activations["dw_1"] == pytest.approx(
        (1 / float(net.conv2.input_quantizers.input.scale),), rel=1e-7
    )
    unread = ["add.input_quantizers.a", "add.input_quantizers.b", "fc.input_quantizers.input"]
    assert list(report.left_out) == unread
    assert "no Convolution" in report.left_out[unread[0]]


def test_per_tensor_weights_and_extreme_scales(path: Path) -> None:
    net = ncnn_net.net(weight={**export_models.NARROW, "qscheme": "per_tensor_symmetric"})
    with torch.no_grad():
        net.fc.parametrizations.weight.original.mul_(1e-40)  # its scale is the least one
        net.input_quantizers.x.scale.fill_(1e36)
    export.ncnn_table(net, ncnn_net.images(), path)
    read = export.read_ncnn_table(path)
    assert [len(row) for row in read.weights.values()] == [16, 16, 24, 5]
    assert read.weights["fc_param_0"] == (2.0**126,) * 5
    assert read.activations["conv"][0] == pytest.approx(1e-36, rel=1e-6)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.up = nn.ConvTranspose2d(4, 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.grouped(self.conv(x)))


class Summing(nn.Module):
    """The linear layer reads a sum that nothing quantizes."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x + 1)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x))


class Padded(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.fc = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(nn.functional.pad(x[..., :10], (1, 1), value=self.value))


def made(net: nn.Module, **keys: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        net.qconfig = get_default_qconfig(
            activation_qkwargs=export_models.NARROW, weight_qkwargs=export_models.NARROW
        )
        return export_models.run(prepare_qat(net.eval(), **keys), ncnn_net.images())

    return make


def made_with_input_alone(net: nn.Module) -> Callable[[], nn.Module]:
    """Quantized are the model's input and weights: layers read it through what comes between."""
    narrow = get_default_qconfig(
        activation_qkwargs=export_models.NARROW, weight_qkwargs=export_models.NARROW
    )
    weights = QConfig(activation=None, weight=narrow.weight)

    def make() -> nn.Module:
        net.qconfig = weights
        return export_models.run(prepare_qat(net.eval(), input_qconfig=narrow), ncnn_net.images())

    return make


def folded() -> nn.Module:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    return made(net, example_inputs=ncnn_net.images(), fold_batch_norms=True)()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "wide": (lambda: ncnn_net.net(None), "input_quantizers.x: its grid is [-128, 127], not [-127"),
    "wide weight": (
        lambda: ncnn_net.net(weight=None),
        "conv.parametrizations.weight.0: its grid is [-128, 127]",
    ),
    "int4": (
        lambda: ncnn_net.net(weight={"dtype": "int4"}),
        "conv.parametrizations.weight.0: its grid is [-8, 7]",
    ),
    "axis": (
        lambda: ncnn_net.net(weight={**export_models.NARROW, "ch_axis": 1}),
        "conv.parametrizations.weight.0: it is per channel on axis 1",
    ),
    "groups": (made(Grouped()), "grouped.parametrizations.weight.0: its 2 groups have several"),
    "transposed": (made(Grouped()), "up.parametrizations.weight.0: it is of a layer that has no"),
    "sum": (
        made_with_input_alone(Summing()),
        "fc.parametrizations.weight.0: the input of fc is not quantized",
    ),
    "padding": (
        made_with_input_alone(Padded(1.5)),
        "fc.parametrizations.weight.0: the input of fc is not quanti",
    ),
    "twice": (
        made(Twice(), example_inputs=ncnn_net.images()),
        "fc.parametrizations.weight.0: fc is called twice, on values of in",
    ),
    "folded": (folded, "0.parametrizations.weight.1: the layer reads something computed from"),
}


@pytest.mark.parametrize(
    "keeping",
    [
        lambda x: nn.functional.pad(x[..., 1:11], (1, 1)),
        lambda x: nn.functional.pad(x[..., 2:], (1, 1, 0, 0), mode="replicate"),
        lambda x: x.chunk(3, dim=1)[1].mT,
        lambda x: x.split([2, 1], dim=1)[0].flip(1),
        lambda x: nn.functional.adaptive_max_pool2d(x, 12).roll(1, -1),
        lambda x: nn.functional.dropout2d(x[:, [0, 2]], training=False).relu_(),
        lambda x: x.movedim(1, 2).repeat(1, 1, 2, 1).narrow(2, 1, 3),
    ],
)
def test_layers_read_quantizers_through_what_keeps_values(
    keeping: Callable[[Tensor], Tensor], path: Path
) -> None:
    """The result's values are all on the grid of the quantizer that the table names."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(12, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(keeping(x))

    net = made_with_input_alone(Keeping())()
    export.ncnn_table(net, ncnn_net.images(), path)
    quantizer = net.input_quantizers.x
    scale = float(quantizer.scale)
    (multiplier,) = export.read_ncnn_table(path).activations["fc"]
    assert multiplier == pytest.approx(1 / scale, rel=1e-6)
    levels = keeping(quantizer(ncnn_net.images())) / scale
    assert torch.allclose(levels, levels.round(), atol=1e-3)


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name_and_reason(case: str, path: Path) -> None:
    make, text = REFUSED[case]
    net = make()
    if case == "groups":  # what refuses first would hide it
        set_fake_quantize(net, "float", pattern="up.*")
    with pytest.raises(ValueError, match=r"^export\.ncnn_table: ") as caught:
        export.ncnn_table(net, ncnn_net.images(), path)
    assert text in str(caught.value)
    assert not path.exists()


def test_bad_names_and_places(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = ncnn_net.net()
    own = {name: name for name in ncnn_net.LAYERS}
    for name, text in (
        ("a b", "expected its name to be without ' ' and _param_, got 'a b'"),
        ("x_param_0", "expected its name to be without ' ' and _param_"),
        ("x" * 248, "expected its key to be of at most 255 bytes"),
        ("fc", "its name 'fc' is that of"),
    ):
        with pytest.raises(ValueError, match=r"^export\.ncnn_table: ") as caught:
            export.ncnn_table(net, ncnn_net.images(), path, {**own, "conv": name})
        assert text in str(caught.value)
    with pytest.raises(ValueError, match=r"names: unknown evil; known: conv"):
        export.ncnn_table(net, ncnn_net.images(), path, {"evil": "x"})
    with pytest.raises(ValueError, match=r"to end in \.table"):
        export.ncnn_table(net, ncnn_net.images(), path.with_suffix(".txt"))
    set_fake_quantize(net, "float", pattern="*parametrizations*")
    with pytest.raises(ValueError, match="Conv2d or Linear, got none"):
        export.ncnn_table(net, ncnn_net.images(), path)
    assert not path.exists()
    set_fake_quantize(net, "validation")
    check_failing_writes(
        lambda target: export.ncnn_table(net, ncnn_net.images(), target), path, monkeypatch
    )


def test_a_table_of_ncnn2table(path: Path) -> None:
    """Blanks at the ends of lines, six decimals, CR LF, static rows; what follows a blank line is
    not read."""
    path.write_bytes(
        b"conv1_param_0 812.345642 790.001221 \r\nfc_param_0 133.700000 \r\n"
        b"lstm_param_0 1e2 .5\r\nlstm_param_1 3.\r\nconv1 52.310001 \r\nfc 0 \r\n\r\nevil\r\n"
    )
    read = export.read_ncnn_table(path)
    assert read.weights["conv1_param_0"] == pytest.approx((812.345642, 790.001221), rel=1e-7)
    assert read.weights["lstm_param_0"] == (100.0, 0.5)
    assert list(read.activations) == ["conv1", "fc"]


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "expected at least one row"),
    "blank": (b"\na_param_0 1\n", "expected at least one row"),
    "binary": (b"\xff\xfe", "expected text in UTF-8"),
    "no scales": (b"a_param_0\n", "line 1: expected scales behind 'a_param_0'"),
    "text": (b"a_param_0 1\na x\n", "line 2: expected a scale of 0 or more, got 'x'"),
    "inf": (b"a_param_0 inf\n", "line 1: expected a scale of 0 or more, got 'inf'"),
    "nan": (b"a_param_0 nan\n", "line 1: expected a scale of 0 or more, got 'nan'"),
    "huge": (b"a_param_0 1e39\n", "line 1: expected a scale of 0 or more, got '1e39'"),
    "minus": (b"a_param_0 -1\n", "line 1: expected a scale of 0 or more, got '-1'"),
    "underscore": (b"a_param_0 1_0\n", "line 1: expected a scale"),
    "llm": (b"a_param_1 bits=4 block=64 s0\n", "line 1: expected a scale of 0 or more, got 'bits"),
    "alone": (b"a 1\n", "a: expected a row a_param_0 beside it"),
    "twice": (b"a_param_0 1\na_param_0 2\n", "line 2: 'a_param_0' stands there twice"),
    "long": (b"a" * 256 + b" 1\n", "line 1: expected a key to be shorter"),
    "bell": (b"a\a_param_0 1\n", "line 1: expected a key to be printable"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("error")
def test_hostile_files_are_refused_by_line(case: str, path: Path) -> None:
    data, text = HOSTILE[case]
    path.write_bytes(data)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        export.read_ncnn_table(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500
