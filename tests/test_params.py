"""load_observer_params and its files: every pair of observers, reports, hostile files."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torch_ext
from nets import (
    ACTIVATIONS,
    WEIGHTS,
    TinyNet,
    calibrated,
    images,
    prepared,
    same,
    same_bits,
    snapshot,
)
from torch_ext import (
    FakeQuantize,
    get_default_qconfig,
    load_observer_params,
    ops,
    save_observer_params,
    set_fake_quantize,
)
from torch_ext._walk import named_quantizers


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


RULES = torch_ext.observers()
STATISTIC = ("observer.extrema", "observer.tally", "observer.counts")
PARAMETERS = ("range", "scale", "zero_point", "solved")


def config(rule: str, **keys: Any) -> torch_ext.QConfig:
    return get_default_qconfig(activation_observer=rule, weight_observer=rule, **keys)


def solved_net(rule: str, **keys: Any) -> TinyNet:
    return calibrated(config(rule, **keys))


@pytest.fixture(scope="module")
def sources() -> dict[str, TinyNet]:
    torch.set_num_threads(1)
    return {rule: solved_net(rule) for rule in RULES}


@pytest.mark.parametrize("through_file", [False, True], ids=["model", "file"])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(RULES, repeat=2)))
def test_every_pair_of_observers(
    source: str,
    target: str,
    through_file: bool,
    sources: dict[str, TinyNet],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from_model, to_model = sources[source], prepared(config(target))
    given: Any = from_model
    if through_file:
        given = tmp_path / "params.safetensors"
        save_observer_params(from_model, given)
    before = snapshot(from_model)
    own = snapshot(to_model)
    report = load_observer_params(given, to_model)
    assert str(report) + "\n" == capsys.readouterr().out
    assert same(snapshot(from_model), before)
    assert report.complete
    everything = {*ACTIVATIONS, *WEIGHTS}
    if target == "fixed_scale":
        assert (set(report.kept), report.loaded) == (everything, [])
    else:
        assert (report.kept, set(report.loaded)) == ([], everything)
    after = snapshot(to_model)
    for name in everything:
        for field in PARAMETERS:
            key = f"{name}.{field}"
            want = own[key] if target == "fixed_scale" else before[key]
            assert same_bits(after[key], want), key
        counts = before[f"{name}.observer.counts"].numel()
        fits = counts > 0 or own[f"{name}.observer.counts"].numel() == 0
        assert (name in report.statistics_skipped) == (not fits)
        if fits and own[f"{name}.observer.counts"].numel():
            for field in STATISTIC:
                assert same_bits(after[f"{name}.{field}"], before[f"{name}.{field}"])
    set_fake_quantize(to_model, "validation")
    if target != "fixed_scale":
        assert same_bits(to_model(images()).detach(), from_model(images()).detach())


def test_training_goes_on_from_the_loaded_range() -> None:
    source, target = solved_net("mse"), prepared(config("min_max"))
    load_observer_params(source, target)
    set_fake_quantize(target, "qat")
    x = images(seed=8) * 2
    with torch.no_grad():
        target(x)
    old, batch = source.input_quantizers.x.range, torch.stack(torch.aminmax(x)).reshape(1, 2)
    want = (old.double() + 0.01 * (batch.double() - old.double())).float()
    assert torch.allclose(target.input_quantizers.x.range, want, rtol=1e-6)


def test_a_frozen_model_after_loading_computes_what_validation_did() -> None:
    source = solved_net("percentile")
    frozen = config("min_max", activation_qkwargs={"averaging_constant": 0.0},
                    weight_qkwargs={"averaging_constant": 0.0})  # fmt: skip
    target = prepared(frozen)
    load_observer_params(source, target)
    set_fake_quantize(target, "qat")
    assert same_bits(target(images()).detach(), source(images()).detach())


@pytest.mark.parametrize(
    "keys",
    [
        {"activation_qkwargs": {"dtype": "int4"}, "weight_qkwargs": {"dtype": "int4"}},
        {"activation_qkwargs": {"dtype": "uint8", "qscheme": torch.per_tensor_affine}},
        {"activation_qkwargs": {"scale_rule": "tvm"}, "weight_qkwargs": {"power_of_two": True}},
    ],
)
def test_another_grid_gets_its_own_scale_from_the_range(keys: dict[str, Any]) -> None:
    source, target = solved_net("percentile"), prepared(config("min_max", **keys))
    report = load_observer_params(source, target)
    assert report.converted
    quantizers = named_quantizers(target)
    for name, quantizer in named_quantizers(source).items():
        observer = quantizers[name].observer
        scale, zero_point = ops.qparams(
            quantizer.range, observer.quant_min, observer.quant_max, observer.symmetric,
            observer.scale_rule, observer.power_of_two,
        )  # fmt: skip
        assert same_bits(quantizers[name].range, quantizer.range)
        assert same_bits(quantizers[name].scale, scale)
        assert same_bits(quantizers[name].zero_point, zero_point)


def test_per_channel_and_per_tensor() -> None:
    channels = solved_net("min_max")
    whole = prepared(config("min_max", weight_qkwargs={"qscheme": torch.per_tensor_symmetric}))
    report = load_observer_params(channels, whole)
    assert set(report.converted) == set(WEIGHTS)
    ranges = channels.conv1.parametrizations.weight[0].range
    joined = whole.conv1.parametrizations.weight[0]
    assert joined.range.tolist() == [[float(ranges[:, 0].min()), float(ranges[:, 1].max())]]
    assert same_bits(joined.scale, ops.qparams(joined.range, -128, 127, True)[0])
    assert set(report.statistics_skipped) == set(WEIGHTS)

    back = prepared(config("min_max"))
    load_observer_params(whole, back)
    spread = back.conv1.parametrizations.weight[0]
    assert spread.range.tolist() == joined.range.tolist() * 4
    assert spread.scale.tolist() == joined.scale.tolist() * 4


def test_a_statistic_without_histogram_has_nothing_tiny() -> None:
    source = prepared(config("percentile"))
    set_fake_quantize(source, "calibration")
    x = images()
    x[0, 0, 0, 0] = 1e-30
    with torch.no_grad():
        source(x)
    set_fake_quantize(source, "validation")
    assert int(source.input_quantizers.x.observer.tally[0, 2]) == 1
    target = prepared(config("min_max"))
    load_observer_params(source, target)
    tally = target.input_quantizers.x.observer.tally
    assert tally.tolist() == [[x.numel(), 0, 0, 0, 0]]


def test_missing_unexpected_and_mismatched_are_refused_then_reported(
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = solved_net("min_max")
    smaller = torch_ext.prepare_qat(_float(source), mapping={"": config("min_max"), "fc": None})
    wider = TinyNet()
    wider.conv1 = nn.Conv2d(1, 4, 3, padding=1)
    wider.fc = nn.Linear(4, 5)
    wider = torch_ext.prepare_qat(wider, mapping={"": config("min_max")})
    cases = [(source, smaller, "unexpected"), (smaller, source, "missing"),
             (source, wider, "mismatched")]  # fmt: skip
    set_fake_quantize(smaller, "qat")
    smaller(images())
    for one, other, label in cases:
        before = snapshot(other)
        with pytest.raises(ValueError, match="check the qconfigs") as caught:
            load_observer_params(one, other)
        assert f"{label}: fc.parametrizations.weight.0" in str(caught.value)
        assert same(snapshot(other), before)
        assert capsys.readouterr().out == ""
        report = load_observer_params(one, other, strict=False)
        assert "fc.parametrizations.weight.0" in getattr(report, label)
        assert not report.complete
        assert "conv1.activation_quantizer" in report.loaded
        assert f"{label}: fc.parametrizations.weight.0" in capsys.readouterr().out
        assert not same(snapshot(other), before) or label == "missing"


def _float(model: TinyNet) -> TinyNet:
    plain = TinyNet()
    plain.load_state_dict(torch_ext.float_state_dict(model))
    return plain


def test_weights_come_along_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    with torch.no_grad():
        source.fc.parametrizations.weight.original.add_(1)
        source.bn1.running_mean.add_(1)
    before = target.fc.parametrizations.weight.original.clone()
    load_observer_params(source, target)
    assert torch.equal(target.fc.parametrizations.weight.original, before)
    report = load_observer_params(source, target, weights=True, verbose=True)
    assert "float tensors: fc.weight" in capsys.readouterr().out
    assert "bn1.running_mean" in report.weights
    set_fake_quantize(target, "validation")
    assert same_bits(target(images()).detach(), source(images()).detach())


def test_nothing_to_load_is_an_error() -> None:
    source, target = prepared(config("min_max")), prepared(config("min_max"))
    set_fake_quantize(source, "calibration")
    source(images())
    with pytest.raises(ValueError, match="no ranges to load; if it is in CALIBRATION, leave"):
        load_observer_params(source, target)
    with pytest.raises(ValueError, match="model to have quantizers, got none"):
        load_observer_params(TinyNet(), target)
    with pytest.raises(TypeError, match="from_model to be a model or a file, got 3"):
        load_observer_params(3, target)  # type: ignore[arg-type]


def test_quantizers_without_a_range_are_reported() -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    source.fc.activation_quantizer.reset_parameters()
    report = load_observer_params(source, target)
    assert report.unsolved == ["fc.activation_quantizer"]
    assert not bool(target.fc.activation_quantizer.solved)


def test_loading_into_validation_ends_passing_through() -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    set_fake_quantize(target, "validation", allow_unobserved=True)
    load_observer_params(source, target)
    assert not any(q.passes_through for q in named_quantizers(target).values())
    assert same_bits(target(images()).detach(), source(images()).detach())


def test_compiled_and_parallel_wrappers_have_the_same_names() -> None:
    source, target = solved_net("min_max"), prepared(config("min_max"))
    wrapped = nn.DataParallel(torch.compile(source, backend="eager"))  # type: ignore[arg-type]
    assert load_observer_params(wrapped, target).complete


class TestFiles:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return tmp_path / "params.safetensors"

    def test_saving_twice_gives_the_same_bytes(self, path: Path) -> None:
        net = solved_net("kl")
        save_observer_params(net, path)
        first = path.read_bytes()
        save_observer_params(net, path)
        assert path.read_bytes() == first
        copy = prepared(config("kl"))
        load_observer_params(path, copy)
        save_observer_params(copy, path)
        assert path.read_bytes() == first
        assert os.listdir(path.parent) == [path.name]

    def test_the_file_is_plain_safetensors(self, path: Path) -> None:
        library = pytest.importorskip("safetensors")
        net = solved_net("kl")
        save_observer_params(net, str(path))
        with library.safe_open(path, "pt") as file:
            assert same_bits(
                file.get_tensor("fc.activation_quantizer.observer.counts"),
                net.fc.activation_quantizer.observer.counts,
            )
            description = json.loads(file.metadata()["torch_ext"])
        assert (description["kind"], description["version"]) == ("observer_params", 1)
        assert description["content"]["quantizers"]["input_quantizers.x"]["observer"] == "kl"

    def test_a_quantizer_alone(self, path: Path) -> None:
        one, other = FakeQuantize(observer="mse"), FakeQuantize(observer="kl")
        one.state = "calibration"
        one(torch.randn(100))
        one.state = "validation"
        save_observer_params(one, path)
        assert load_observer_params(path, other).loaded == [""]
        assert same_bits(one.scale, other.scale)

    @pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
    def test_a_failing_write_leaves_the_old_file(
        self, path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save_observer_params(solved_net("min_max"), path)
        before = path.read_bytes()

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        if moment == "write":
            import builtins

            opened = builtins.open

            def broken(file: Any, mode: str = "r", *args: Any) -> Any:
                made = opened(file, mode, *args)
                if mode == "wb":
                    made.close()
                return made

            monkeypatch.setattr("torch_ext._files.open", broken, raising=False)
        else:
            monkeypatch.setattr(os, moment, fail)
        with pytest.raises((OSError, ValueError)):
            save_observer_params(solved_net("percentile"), path)
        monkeypatch.undo()
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == [path.name]

    def test_bad_places(self, path: Path) -> None:
        net = solved_net("min_max")
        with pytest.raises(FileNotFoundError, match="nowhere to exist"):
            save_observer_params(net, path.parent / "nowhere" / "file")
        with pytest.raises(FileExistsError, match="got a folder"):
            save_observer_params(net, path.parent)
        path.symlink_to(path.parent / "else")
        with pytest.raises(FileExistsError, match="got a symbolic link"):
            save_observer_params(net, path)
        with pytest.raises(FileNotFoundError):
            load_observer_params(path.parent / "none", net)
        save_observer_params(net, path.parent / "fine")
        with pytest.raises(ValueError, match="weights=False with a file, which holds none"):
            load_observer_params(path.parent / "fine", net, weights=True)

    @pytest.mark.parametrize(
        ("field", "value", "text"),
        [
            ("scale", 0.0, "scale: expected values to be finite and above 0, got 0"),
            ("scale", torch.nan, "scale: expected values to be finite and above 0, got nan"),
            ("range", torch.inf, "range: expected values to be finite"),
            ("zero_point", 300, "zero_point: expected values to be on the grid, got 300"),
            ("solved", 7, "solved: expected values to be 0 or 1, got 7"),
            ("observer.tally", -1, "observer.tally: expected values to be at least 0"),
            ("observer.extrema", torch.nan, "observer.extrema: expected values to be min <= max"),
            ("observer.counts", -1, "observer.counts: expected values to be at least 0"),
            ("observer.counts", 2**62, "observer.counts: expected values to be countable"),
            ("observer.counts", 3, "observer.counts: expected values to be as many as the tally"),
        ],
    )
    def test_values_that_cannot_be_are_not_saved_and_not_loaded(
        self, path: Path, field: str, value: float, text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        net = solved_net("percentile")
        quantizer = net.fc.activation_quantizer
        quantizer.get_buffer(field).fill_(value)
        where = f"fc.activation_quantizer.{text}"
        with pytest.raises(ValueError, match="save_observer_params") as caught:
            save_observer_params(net, path)
        assert where in str(caught.value)
        assert not path.exists()

        for check in ("check_parameters", "check_statistic"):
            monkeypatch.setattr(f"torch_ext.params.{check}", lambda _: None)
        save_observer_params(net, path)
        monkeypatch.undo()
        target = solved_net("min_max")
        before = snapshot(target)
        with pytest.raises(ValueError, match=str(path)) as caught:
            load_observer_params(path, target)
        assert where in str(caught.value)
        assert same(snapshot(target), before)


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join(header: dict[str, Any] | bytes, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def described(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Changes the description in the header."""

    def apply(data: bytes) -> bytes:
        header, body = split(data)
        content = json.loads(header["__metadata__"]["torch_ext"])
        change(content)
        header["__metadata__"]["torch_ext"] = json.dumps(content)
        return join(header, body)

    return apply


def entered(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    """Changes the entries of the header."""

    def apply(data: bytes) -> bytes:
        header, body = split(data)
        change(header)
        return join(header, body)

    return apply


SCALE = "fc.activation_quantizer.scale"
SPEC = "fc.activation_quantizer"


def rename(header: dict[str, Any], name: str) -> None:
    header[name] = header.pop(SCALE)


def spec(key: str, value: Any) -> Callable[[bytes], bytes]:
    return described(lambda c: c["content"]["quantizers"][SPEC].__setitem__(key, value))


def twice(data: bytes) -> bytes:
    header, body = split(data)
    text = json.dumps(header)
    entry = f'"{SCALE}": {json.dumps(header[SCALE])}'
    return join(text.replace(entry, f"{entry}, {entry}").encode(), body)


HOSTILE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda d: b"", "truncated, or no safetensors file (0 bytes)"),
    "seven bytes": (lambda d: d[:7], "truncated"),
    "header cut": (lambda d: d[:100], "truncated"),
    "data cut": (lambda d: d[:-1], "truncated or too long"),
    "data added": (lambda d: d + b"\0", "truncated or too long"),
    "huge header": (lambda d: struct.pack("<Q", 2**63) + d[8:], "truncated"),
    "long header": (
        lambda d: struct.pack("<Q", 17 * 2**20) + bytes(17 * 2**20),
        "expected a header of at most",
    ),
    "no json": (lambda d: join(b"{]", b""), "header: Expecting property name"),
    "no utf-8": (lambda d: join(b"\xff{}", b""), "header: 'utf-8' codec"),
    "a list": (lambda d: join(b"[]", b""), "header: expected an object"),
    "deep": (lambda d: join(b'{"a":' * 50000 + b"1" + b"}" * 50000, b""), "header: "),
    "long number": (lambda d: join(b'{"a":' + b"9" * 5000 + b"}", b""), "header: Exceeds"),
    "nan": (lambda d: join(b'{"a": NaN}', b""), "header: NaN is no number"),
    "duplicate key": (twice, f'header: duplicate key "{SCALE}"'),
    "not ours": (lambda d: join(b"{}", b""), "not a file of torch_ext"),
    "metadata list": (entered(lambda h: h.update(__metadata__=[1])), "not a file of torch_ext"),
    "other kind": (described(lambda c: c.update(kind="calibration")), "kind: expected 'observer_p"),
    "newer": (described(lambda c: c.update(version=2)), "version: this release reads 1, got 2"),
    "version true": (described(lambda c: c.update(version=True)), "version: this release reads 1"),
    "no content": (described(lambda c: c.pop("content")), "quantizers: missing"),
    "content list": (described(lambda c: c.update(content=[])), "quantizers: missing"),
    "spec text": (
        described(lambda c: c["content"]["quantizers"].__setitem__(SPEC, "x")),
        f"{SPEC}.expected a description, got x",
    ),
    "spec missing": (
        described(lambda c: c["content"]["quantizers"].pop(SPEC)),
        "belongs to no quantizer of the description",
    ),
    "spec dtype": (spec("dtype", "int99"), f"{SPEC}.description: unknown dtype 'int99'"),
    "spec grid": (spec("quant_min", -1000), f"{SPEC}.description: expected quant_min to be"),
    "spec grid kind": (spec("quant_min", "x"), f"{SPEC}.description: expected quant_min to be an"),
    "spec observer": (spec("observer", "evil"), f'{SPEC}.unknown observer "evil"'),
    "spec scale rule": (spec("scale_rule", None), f"{SPEC}.scale_rule, power_of_two: got None"),
    "spec channels": (spec("channel_len", 3), f"{SPEC}.description: expected channel_len"),
    "missing": (entered(lambda h: rename(h, "zzz")), f"{SPEC}.scale: missing"),
    "bad name": (entered(lambda h: rename(h, "a\nb")), "expected names to be printable"),
    "no name": (entered(lambda h: rename(h, "")), "expected names to be of 1 to 1024 bytes"),
    "long name": (entered(lambda h: rename(h, "x" * 1025)), "expected names to be of 1 to 1024"),
    "no entry": (entered(lambda h: h.__setitem__(SCALE, 3)), f"{SCALE}.shape: expected sizes"),
    "dtype": (entered(lambda h: h[SCALE].update(dtype="F64")), f"{SCALE}.dtype: unknown 'F64'"),
    "dtype list": (entered(lambda h: h[SCALE].update(dtype=["F32"])), f"{SCALE}.dtype: unknown"),
    "dtype other": (
        entered(lambda h: h[SCALE].update(dtype="I32")),
        f"{SPEC}.scale: expected torch.float32 [1], got torch.int32 [1]",
    ),
    "shape": (entered(lambda h: h[SCALE].update(shape=[2])), f"{SCALE}: 4 bytes do not hold"),
    "shape rank": (
        entered(lambda h: h[SCALE].update(shape=[1, 1])),
        f"{SPEC}.scale: expected torch.float32 [1], got torch.float32 [1, 1]",
    ),
    "shape overflow": (
        entered(lambda h: h[SCALE].update(shape=[2**32, 2**32, 1])),
        f"{SCALE}: 4 bytes do not hold",
    ),
    "shape negative": (entered(lambda h: h[SCALE].update(shape=[-1])), f"{SCALE}.shape"),
    "shape deep": (entered(lambda h: h[SCALE].update(shape=[1] * 9)), f"{SCALE}.shape"),
    "shape bool": (entered(lambda h: h[SCALE].update(shape=[True])), f"{SCALE}.shape"),
    "offsets": (entered(lambda h: h[SCALE].update(data_offsets=[0])), f"{SCALE}.data_offsets"),
    "offsets past": (
        entered(lambda h: h[SCALE].update(data_offsets=[2**40, 2**40 + 4])),
        ": expected data at offset",
    ),
    "offsets back": (
        entered(lambda h: h[SCALE].update(data_offsets=[8, 4])),
        f"{SCALE}: -4 bytes do not hold",
    ),
    "overlap": (
        entered(lambda h: h[SCALE].update(data_offsets=h[f"{SPEC}.zero_point"]["data_offsets"])),
        "expected data at offset",
    ),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    torch.set_num_threads(1)
    path = tmp_path_factory.mktemp("saved") / "params"
    save_observer_params(solved_net("percentile"), path)
    return path.read_bytes()


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused_by_file_and_field(
    case: str, saved: bytes, tmp_path: Path
) -> None:
    damage, text = HOSTILE[case]
    path = tmp_path / "params.safetensors"
    path.write_bytes(damage(saved))
    target = solved_net("min_max")
    before = snapshot(target)
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the text is compared below
        load_observer_params(path, target)
    assert str(caught.value).startswith(f"{path}: ")
    assert text in str(caught.value)
    assert len(str(caught.value)) < 500
    assert same(snapshot(target), before)


def test_any_flipped_byte_is_refused_or_harmless(saved: bytes, tmp_path: Path) -> None:
    """Never a crash, and never parameters that a solve could not have made."""
    path = tmp_path / "params"
    (length,) = struct.unpack("<Q", saved[:8])
    generator = torch.Generator().manual_seed(0)
    header = torch.randint(0, 8 + length, (60,), generator=generator)
    body = torch.randint(8 + length, len(saved), (20,), generator=generator)
    target = prepared(config("min_max"))
    for position in torch.cat([header, body]).tolist():
        damaged = bytearray(saved)
        damaged[position] ^= 0x11
        path.write_bytes(damaged)
        with contextlib.suppress(ValueError):
            load_observer_params(path, target, strict=False)
        for quantizer in named_quantizers(target).values():
            assert bool((quantizer.scale > 0).all() & quantizer.scale.isfinite().all())
