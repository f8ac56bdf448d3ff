"""Parameter files: what is written, and what hostile ones are answered with."""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nets.tiny_net import prepared
from params_of_rules import config, solved_net
from snapshots import same, same_bits, snapshot
from torch_ext import (
    FakeQuantize,
    load_observer_params,
    named_quantizers,
    save_observer_params,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
                file.get_tensor("fc.input_quantizers.input.observer.counts"),
                net.fc.input_quantizers.input.observer.counts,
            )
            description = json.loads(file.metadata()["torch_ext"])
        assert (description["kind"], description["version"]) == ("observer_params", 1)
        assert (
            description["content"]["quantizers"]["conv1.input_quantizers.input"]["observer"] == "kl"
        )

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

            monkeypatch.setattr("torch_ext.files.storage.open", broken, raising=False)
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
        with pytest.raises(ValueError, match="weights to be False with a file, got True"):
            load_observer_params(path.parent / "fine", net, weights=True)

    @pytest.mark.parametrize(
        ("field", "value", "text"),
        [
            ("scale", 0.0, "scale: expected values to be finite and above 0, got 0"),
            ("scale", torch.nan, "scale: expected values to be finite and above 0, got nan"),
            ("range", torch.inf, "range: expected values to be finite"),
            ("zero_point", 300, "zero_point: expected values to be on the grid, got 300"),
            ("solved", 7, "solved: expected values to be 0, 1 or 2, got 7"),
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
        quantizer = net.fc.input_quantizers.input
        quantizer.get_buffer(field).fill_(value)
        where = f"fc.input_quantizers.input.{text}"
        with pytest.raises(ValueError, match="save_observer_params") as caught:
            save_observer_params(net, path)
        assert where in str(caught.value)
        assert not path.exists()

        for check in ("check_parameters", "check_statistic"):
            monkeypatch.setattr(f"torch_ext.files.observer_params.{check}", lambda _: None)
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


SCALE = "fc.input_quantizers.input.scale"
SPEC = "fc.input_quantizers.input"


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
    "empty": (lambda d: b"", "truncated, or not a safetensors file (0 bytes)"),
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
    "nested": (
        lambda d: join(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}", b""),
        "header: expected at most 8 levels of nesting",
    ),
    "long number": (lambda d: join(b'{"a":' + b"9" * 5000 + b"}", b""), "header: Exceeds"),
    "nan": (lambda d: join(b'{"a": NaN}', b""), "header: expected finite numbers, got NaN"),
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
        f"{SPEC}.description: expected an object, got x",
    ),
    "spec missing": (
        described(lambda c: c["content"]["quantizers"].pop(SPEC)),
        "belongs to no quantizer of the description",
    ),
    "spec dtype": (spec("dtype", "int99"), f"{SPEC}.description: unknown dtype 'int99'"),
    "spec grid": (spec("quant_min", -1000), f"{SPEC}.description: expected quant_min to be"),
    "spec grid kind": (spec("quant_min", "x"), f"{SPEC}.description: expected quant_min to be an"),
    "spec observer": (spec("observer", "evil"), f'{SPEC}.description: unknown observer "evil"'),
    "spec scale rule": (
        spec("scale_rule", None),
        f"{SPEC}.description: Observer(percentile): unknown scale_rule None",
    ),
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
        f"{SCALE}.shape: expected at most",
    ),
    "shape of nothing": (
        entered(lambda h: h[SCALE].update(shape=[0, 2**40, 2**40], data_offsets=[0, 0])),
        f"{SCALE}.shape: expected at most",
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
