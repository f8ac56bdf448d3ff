"""The JSON export: what it holds, its schema, its reader, and hostile documents."""

from __future__ import annotations

import copy
import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import export_models
import torch_ext
from failing_writes import check_failing_writes
from snapshots import same_bits
from torch_ext import export, get_default_qconfig, named_quantizers, prepare_qat

SCHEMA = json.loads(
    (Path(torch_ext.__file__).parent / "export/calibration.schema.json").read_text()
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.json"


CONFIGS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "kl": ((), {"activation_observer": "kl"}),
    "percentile": ((), {"activation_observer": "percentile"}),
    "affine": ((), {"activation": {"dtype": "uint8", "qscheme": "per_tensor_affine"}}),
    "int4": ((), {"activation": {"dtype": "int16"}, "weight": {"dtype": "int4"}}),
    "fixed": ((), {"activation_observer": "fixed_scale"}),
    "lsq": (("lsq", "lsq"), {}),
    "pact": (("pact", "fake_quant"), {}),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_every_number_reads_back(case: str, path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    methods, keys = CONFIGS[case]
    net = export_models.solved(*methods, **keys)
    report = export.json(net, path)
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    read = export.read_json(path)
    own = named_quantizers(net)
    assert tuple(read.quantizers) == report.quantizers == tuple(own)
    for name, record in read.quantizers.items():
        quantizer = own[name]
        scale, zero_point = quantizer.calculate_qparams()
        assert same_bits(record.scale, scale)
        assert same_bits(record.zero_point, zero_point)
        assert same_bits(record.range, quantizer.range)
        assert same_bits(record.extrema, quantizer.observer.extrema)
        assert same_bits(record.tally, quantizer.observer.tally)
        assert record.spec["method"] == quantizer.method
        assert record.spec["options"] == quantizer.observer.options
        assert record.of == ("weight" if quantizer.transient else record.of)
    assert read.quantizers["fc.input_quantizers.input"].of == "input"
    assert read.quantizers["fc.parametrizations.weight.0"].of == "weight"


FLOATS = ("float8_e4m3", "float8_e5m2", "float6_e2m3", "float6_e3m2", "float4_e2m1")
INTEGERS = [f"int{bits}" for bits in range(2, 17)]


GRIDS = [
    *((dtype, rule) for dtype in FLOATS for rule in ("grid", "floor", "even")),
    *((dtype, rule) for dtype in INTEGERS for rule in ("grid", "tvm", "floor")),
    *((f"u{dtype}", "grid") for dtype in INTEGERS),
]


@pytest.mark.parametrize(("dtype", "scale_rule"), GRIDS)
def test_the_schema_takes_every_grid(dtype: str, scale_rule: str, path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    torch.manual_seed(1)
    net: nn.Module = nn.Sequential(nn.Linear(4, 2))
    keys = {
        "dtype": dtype,
        "group_size": 2,
        "scale_rule": scale_rule,
        "qscheme": "per_channel_affine" if dtype[0] == "u" else "per_channel_symmetric",
    }
    net.qconfig = get_default_qconfig(weight_qkwargs=keys)  # type: ignore[assignment]
    net = export_models.run(prepare_qat(net), torch.randn(2, 4))
    export.json(net, path)
    jsonschema.validate(json.loads(path.read_text()), SCHEMA)
    spec = export.read_json(path).quantizers["0.parametrizations.weight.0"].spec
    assert (spec["dtype"], spec["scale_rule"]) == (dtype, scale_rule)


def test_the_digest_is_sha256_of_the_statistic(path: Path) -> None:
    """Packed here by hand, value by value."""
    net = export_models.solved(activation_observer="percentile")
    export.json(net, path)
    observer = net.fc.input_quantizers.input.observer
    digest = hashlib.sha256()
    for field, code in (("extrema", "f"), ("tally", "q"), ("counts", "q")):
        tensor = getattr(observer, field)
        digest.update(f"observer.{field}{list(tensor.shape)}".encode())
        values = tensor.flatten().tolist()
        digest.update(struct.pack(f"<{len(values)}{code}", *values))
    read = export.read_json(path).quantizers["fc.input_quantizers.input"]
    assert read.digest == digest.hexdigest()

    observer(torch.ones(1))  # one value more is another statistic
    export.json(net, path)
    other = export.read_json(path).quantizers
    assert other["fc.input_quantizers.input"].digest != read.digest


def test_equal_models_give_equal_bytes(path: Path) -> None:
    export.json(export_models.solved(), path)
    first = path.read_bytes()
    export.json(export_models.solved(), path)
    assert path.read_bytes() == first


def test_what_lets_values_pass_is_left_out_with_the_reason(path: Path) -> None:
    net = export_models.solved()
    torch_ext.set_fake_quantize(net, "float", pattern=["conv1.*", "bn2.*"][:1])
    report = export.json(net, path)
    left = {
        "conv1.input_quantizers.input": "it is in FLOAT",
        "conv1.parametrizations.weight.0": "it is in FLOAT",
    }
    assert report.left_out == left
    assert "left out: conv1.input_quantizers.input (it is in FLOAT)" in str(report)
    read = export.read_json(path)
    assert read.left_out == left
    assert not left.keys() & read.quantizers.keys()


NAME = "fc.input_quantizers.input"


def record(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda document: change(document["quantizers"][NAME])


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], Any]:
    def apply(document: dict[str, Any]) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return apply


# What the schema refuses, and the reader too.
INVALID: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (put("format", value="other"), "format: expected 'torch_ext.calibration'"),
    "version": (put("version", value=2), "version: this release reads 1, got 2"),
    "version true": (put("version", value=True), "version: this release reads 1, got True"),
    "unknown key": (put("more", value=1), "document.more: unknown"),
    "no left_out": (lambda d: d.pop("left_out"), "document.left_out: missing"),
    "left_out": (put("left_out", "x", value=3), "left_out.x: expected text, got 3"),
    "no quantizers": (put("quantizers", value={}), "quantizers: expected at least one"),
    "quantizers": (put("quantizers", value=[1]), "quantizers: expected an object, got [1]"),
    "a number": (put("quantizers", NAME, value=7), f"{NAME}.expected an object, got 7"),
    "missing": (record(lambda r: r.pop("scale")), f"{NAME}.scale: missing"),
    "unknown": (record(lambda r: r.update(evil=1)), f"{NAME}.evil: unknown"),
    "of": (record(lambda r: r.update(of="bias")), f"{NAME}.of: expected one of input, output"),
    "dtype": (record(lambda r: r.update(dtype="int99")), f"{NAME}.description: unknown dtype"),
    "half an end": (
        record(lambda r: r.update(quant_min=-127.5)),
        f"{NAME}.description: expected quant_min to be an integer",
    ),
    "rule": (
        record(lambda r: r.update(scale_rule="x")),
        "unknown scale_rule 'x'; known: grid, tvm",
    ),
    "synced": (record(lambda r: r.update(synced=1)), f"{NAME}.synced: expected true or false"),
    "scale zero": (
        record(lambda r: r.update(scale=[0])),
        f"{NAME}.scale: expected values to be fi",
    ),
    "scale text": (record(lambda r: r.update(scale=["1"])), f"{NAME}.scale: expected a list of nu"),
    "scale bool": (record(lambda r: r.update(scale=[True])), f"{NAME}.scale: expected a list of n"),
    "scale none": (record(lambda r: r.update(scale=[])), f"{NAME}.scale: expected a list of numb"),
    "zero point": (record(lambda r: r.update(zero_point=[0.5])), f"{NAME}.zero_point: expected a"),
    "range rows": (record(lambda r: r.update(range=[[1, 2, 3]])), f"{NAME}.range: expected torch"),
    "tally": (put("quantizers", NAME, "statistic", "tally", value=[[1]]), "observer.tally: expec"),
    "negative": (
        put("quantizers", NAME, "statistic", "tally", value=[[-1, 0, 0, 0, 0]]),
        f"{NAME}.observer.tally: expected values to be at least 0",
    ),
    "digest": (
        put("quantizers", NAME, "statistic", "sha256", value="0" * 63 + "G"),
        f"{NAME}.statistic.sha256: expected 64 hexadecimal digits",
    ),
    "statistic": (put("quantizers", NAME, "statistic", value={}), f"{NAME}.statistic: expected"),
}

# What a schema cannot say.
CONTRADICTIONS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "channels": (record(lambda r: r.update(channel_len=2)), f"{NAME}.description: expected chan"),
    "two scales": (record(lambda r: r.update(scale=[1, 1])), f"{NAME}.scale: expected torch.float"),
    "range order": (record(lambda r: r.update(range=[[2, 1]])), f"{NAME}.range: expected values"),
    "range huge": (record(lambda r: r.update(range=[[0, 1e39]])), f"{NAME}.range: expected values"),
    "off the grid": (record(lambda r: r.update(zero_point=[128])), f"{NAME}.zero_point: expected"),
    "zero point long": (record(lambda r: r.update(zero_point=[2**70])), f"{NAME}.zero_point: "),
    "ragged": (record(lambda r: r.update(range=[[1], [1, 2]])), f"{NAME}.range: "),
    "observer": (
        record(lambda r: r.update(observer="evil")),
        f'{NAME}.description: unknown observer "evil"',
    ),
    "name": (
        lambda d: d["quantizers"].update({"a\nb": d["quantizers"].pop(NAME)}),
        "quantizers: expected names to be printable",
    ),
}


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("json") / "net.json"
    export.json(export_models.solved(), path)
    loaded: dict[str, Any] = json.loads(path.read_text())
    return loaded


@pytest.mark.parametrize("case", [*INVALID, *CONTRADICTIONS])
def test_wrong_documents_are_refused_by_field(
    case: str, document: dict[str, Any], path: Path
) -> None:
    change, text = (INVALID | CONTRADICTIONS)[case]
    broken = copy.deepcopy(document)
    change(broken)
    path.write_text(json.dumps(broken))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        export.read_json(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500
    jsonschema = pytest.importorskip("jsonschema")
    if case in INVALID:
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(broken, SCHEMA)


BYTES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "content: Expecting value"),
    "cut": (lambda d: d[:-9], "content: "),
    "a list": (lambda d: b"[]", "content: expected an object"),
    "no utf-8": (lambda d: b"\xff" + d, "content: 'utf-8' codec"),
    "nan": (
        lambda d: d.replace(b'"scale": [', b'"scale": [NaN, ', 1),
        "content: expected finite numbers, got NaN",
    ),
    "twice": (lambda d: d.replace(b'"version"', b'"version": 1, "version"', 1), "duplicate key"),
    "deep": (lambda d: b'{"a":' * 50000 + b"1" + b"}" * 50000, "content: "),
    "long number": (lambda d: b'{"a":' + b"9" * 5000 + b"}", "content: Exceeds"),
}


@pytest.mark.parametrize("case", BYTES)
def test_hostile_bytes(case: str, document: dict[str, Any], path: Path) -> None:
    damage, text = BYTES[case]
    path.write_bytes(damage(json.dumps(document).encode()))
    with pytest.raises(ValueError, match=r"net\.json: ") as caught:
        export.read_json(path)
    assert text in str(caught.value)


def test_a_file_past_the_limit_is_not_parsed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_bytes(b" " * 101)
    monkeypatch.setitem(export.read_json.__globals__, "_LIMIT", 100)
    with pytest.raises(ValueError, match="expected at most 100 bytes"):
        export.read_json(path)


def test_failing_writes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = export_models.solved()
    check_failing_writes(lambda target: export.json(net, target), path, monkeypatch)
