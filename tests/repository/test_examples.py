"""The examples: their data reader on good and bad files, and each script on a small slice."""

from __future__ import annotations

import dataclasses
import gzip
import math
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import fashion_mnist
import low_bits
import qat_start
import torch_ext
from common import data as example_data
from common import net, replay, report, rivals
from example_runs import run_example

IMAGES = {"train": 12, "t10k": 5}


def idx(magic: int, array: np.ndarray) -> bytes:
    sizes = struct.pack(f">{1 + array.ndim}I", magic, *array.shape)
    return sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A complete small data set: the training part compressed, the test part not."""
    generator = np.random.default_rng(3)
    for part, count in IMAGES.items():
        images = idx(0x803, generator.integers(0, 256, (count, 28, 28)))
        labels = idx(0x801, generator.integers(0, 10, count))
        if part == "train":
            (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
            (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
        else:
            (tmp_path / "t10k-images-idx3-ubyte").write_bytes(images)
            (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(labels)
    return tmp_path


def test_idx_files_are_read_as_numpy_reads_them(folder: Path) -> None:
    data = example_data.load(folder)
    raw = gzip.decompress((folder / "train-images-idx3-ubyte.gz").read_bytes())
    want = np.frombuffer(raw, np.uint8, offset=16).reshape(12, 1, 28, 28).astype(np.float32) / 255
    assert np.array_equal(data.train_images.numpy(), want)
    raw = (folder / "t10k-labels-idx1-ubyte").read_bytes()
    assert data.test_labels.tolist() == list(raw[8:])
    assert data.test_images.shape == (5, 1, 28, 28)
    assert data.train_images.dtype == torch.float32
    assert data.test_labels.dtype == torch.int64


TEST_IMAGES, TEST_LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
TRAIN_IMAGES = "train-images-idx3-ubyte.gz"
SOME_LABELS = np.arange(5)
DAMAGED = {
    "missing": (TEST_LABELS, None, "there is no such file"),
    "empty": (TEST_LABELS, b"", "header is truncated at 0 of 8 bytes"),
    "short header": (TEST_IMAGES, struct.pack(">2I", 0x803, 5), "truncated at 8 of 16 bytes"),
    "labels as images": (TEST_IMAGES, idx(0x801, np.zeros(3000)), "expected it to begin with"),
    "other size": (TEST_IMAGES, idx(0x803, np.zeros((5, 32, 32))), "got (32, 32)"),
    "no items": (TEST_LABELS, idx(0x801, np.zeros(0)), "its header says 0"),
    "absurd count": (TEST_LABELS, struct.pack(">2I", 0x801, 2**32 - 1), "header says 4294967295"),
    "truncated": (TEST_LABELS, idx(0x801, SOME_LABELS)[:-1], "truncated at 4 of the 5 bytes"),
    "goes on": (TEST_LABELS, idx(0x801, SOME_LABELS) + b"x", "goes on after the 5 bytes"),
    "class 10": (TEST_LABELS, idx(0x801, np.array([1, 2, 3, 4, 10])), "label 10 found"),
    "fewer labels": (TEST_LABELS, idx(0x801, SOME_LABELS[:4]), "holds 4 labels, but"),
    "not gzip": (TRAIN_IMAGES, idx(0x803, np.zeros((12, 28, 28))), "cannot be read"),
    "cut gzip": (
        TRAIN_IMAGES,
        gzip.compress(idx(0x803, np.zeros((12, 28, 28))))[:-9],
        "cannot be read: Compressed file ended",
    ),
    "wrong checksum": (
        TRAIN_IMAGES,
        gzip.compress(idx(0x803, np.zeros((12, 28, 28))))[:-8] + bytes(8),
        "cannot be read: CRC check failed",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_file_is_named_with_its_fault(folder: Path, case: str) -> None:
    name, content, fault = DAMAGED[case]
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(example_data.DataError) as caught:
        example_data.load(folder)
    assert name in str(caught.value)
    assert fault in str(caught.value)


def test_folder_that_was_asked_for_is_never_replaced(tmp_path: Path) -> None:
    with pytest.raises(example_data.DataError, match=r"nowhere.*there is no such folder"):
        example_data.load(tmp_path / "nowhere")
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(example_data.DataError, match=r"file.*it is not a folder"):
        example_data.load(file)


def test_digits_replace_a_missing_package_and_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_data, "DEBIAN_FOLDER", tmp_path / "none")
    data = example_data.load()
    assert data.note.startswith("NOTE: no Fashion-MNIST here")
    assert len(data.train_labels) + len(data.test_labels) == 1797
    assert data.train_images.shape[1:] == (1, 28, 28)
    assert 0 <= float(data.train_images.min()) < float(data.train_images.max()) <= 1


def test_augmented_images_are_shifted_or_mirrored_originals() -> None:
    images = torch.rand(40, 1, 28, 28)
    for mirrored in (False, True):
        changed = example_data.augment(images, mirrored, torch.Generator().manual_seed(1))
        flips = 0
        for before, after in zip(images[:, 0], changed[:, 0], strict=True):
            frame = torch.zeros(32, 32)
            frame[2:30, 2:30] = before
            crops = [frame[y : y + 28, x : x + 28] for y in range(5) for x in range(5)]
            plain = any(torch.equal(after, crop) for crop in crops)
            flipped = any(torch.equal(after, crop.flip(1)) for crop in crops)
            assert plain or flipped
            flips += flipped and not plain
        assert (flips > 0) == mirrored


def test_kept_weights_reach_their_accuracy() -> None:
    assert sum(p.numel() for p in net.SmallNet().parameters()) < 100_000
    digits = example_data.digits()
    got = net.accuracy(net.trained("digits"), digits.test_images, digits.test_labels)
    assert got >= 97
    if example_data.DEBIAN_FOLDER.exists():
        data = example_data.load()
        got = net.accuracy(net.trained("fashion_mnist"), data.test_images, data.test_labels)
        assert got >= 91


def prepared_net() -> torch.nn.Module:
    model = torch_ext.fuse(net.trained("digits"))
    model.qconfig = torch_ext.get_default_qconfig(activation_observer="kl")
    images = example_data.digits().train_images[:1]
    return torch_ext.prepare_qat(model, example_inputs=images).eval()


def test_replay_finds_no_difference_between_feeds() -> None:
    model = prepared_net()
    captured = replay.capture(model, example_data.digits().train_images[:20])
    assert set(captured) == {name for name, _ in replay.activation_quantizers(model)}
    outcome = replay.replay(model, captured, replay.feeds(20), {"kl": {}, "percentile": {}})
    assert outcome.differing == []
    assert outcome.compared > 6 * len(captured)
    for scales in outcome.scales.values():
        assert all(len(found) == 4 and len(set(found)) == 1 for found in scales.values())


def test_replay_finds_one_missing_image() -> None:
    model = prepared_net()
    captured = replay.capture(model, example_data.digits().train_images[:20])
    ways = {"all": [torch.arange(20)], "one less": [torch.arange(19)]}
    outcome = replay.replay(model, captured, ways, {"mse": {}})
    assert any("counts" in key for key in outcome.differing)
    assert any("mse" in key for key in outcome.differing)


def test_feeds_hold_every_image_once() -> None:
    for feed in replay.feeds(150).values():
        assert sorted(torch.cat(feed).tolist()) == list(range(150))


def test_spread() -> None:
    assert replay.spread([2.0, 2.0]) == 0
    assert replay.spread([2.0, 3.0]) == 50
    assert replay.spread([0.0, 0.0]) == 0
    assert replay.spread([0.0, 3.0]) == float("inf")


def test_moving_average_rival_follows_its_recurrence() -> None:
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([-8.0, 1.0]), torch.tensor([0.0, 4.0])]
    low, high = -1.0, 2.0
    for batch in batches[1:]:
        low += 0.01 * (float(batch.min()) - low)
        high += 0.01 * (float(batch.max()) - high)
    assert rivals.moving_average(batches) == pytest.approx(max(-low, high), rel=1e-6)


def test_rivals_depend_on_the_order() -> None:
    found, missing = rivals.available()
    assert len(found) + 2 * len(missing) == 3 or len(found) == 3
    values = torch.from_numpy(np.random.default_rng(0).laplace(size=(64, 500)).astype(np.float32))
    values[40] *= 5
    ways = {"up": list(values.split(1)), "down": list(values.flip(0).split(1))}
    for rival in found:
        assert replay.spread([rival.threshold(batches) for batches in ways.values()]) > 0


def test_plain_table_aligns_its_columns() -> None:
    text = report.plain_table("Title", ["name", "value"], [["a", "1.5"], ["longer", "12.25"]])
    assert text.splitlines() == [
        "Title",
        "name    value",
        "------  -----",
        "a         1.5",
        "longer  12.25",
    ]


def test_running_mean() -> None:
    assert report.running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]


def test_main_job_on_a_small_slice(tmp_path: Path) -> None:
    done = run_example("examples/fashion_mnist.py", "--quick", "--output", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "bit for bit the same" in done.stdout
    for rule in torch_ext.observers():
        assert re.search(rf"\b{rule}\b.*\d\d\.\d\d", done.stdout)
    assert re.search(r"mix +mse +\d\d", done.stdout)
    assert "report.html: 25 quantizers" in done.stdout
    assert (tmp_path / "sensitivity.svg").read_text().startswith("<svg")
    assert (tmp_path / "report.html").stat().st_size > 100_000
    picture = (tmp_path / "int4_qat_loss.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_main_job_on_digits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = fashion_mnist.Sizes(60, 32, replayed=8, looked_at=2, swept=20, qat_steps=1, seeds=1)
    fashion_mnist.run(example_data.digits(), sizes, tmp_path)
    out = capsys.readouterr().out
    assert out.startswith("NOTE: no Fashion-MNIST here")
    assert "bit for bit the same" in out
    assert (tmp_path / "int4_qat_loss.png").stat().st_size > 1000


def test_unwritable_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = run_example("examples/fashion_mnist.py", "--output", str(tmp_path / "file" / "output"))
    assert done.returncode == 2
    assert "file/output" in done.stderr
    assert "Traceback" not in done.stderr


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(net, "WEIGHTS_FOLDER", tmp_path)
    path = tmp_path / "digits.safetensors"
    for damage in (None, b"", b"\xff" * 40):
        if damage is not None:
            path.write_bytes(damage)
        with pytest.raises(example_data.DataError, match=re.escape(str(path))):
            net.trained("digits")


def test_eleven_steps_on_a_small_slice() -> None:
    done = run_example("examples/eleven_steps.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert "trained in QAT" in done.stdout


def test_export_on_a_small_slice() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    done = run_example("examples/export_onnx.py", "--quick")
    assert done.returncode == 0, done.stderr
    assert re.search(r"int8\W+no\W+\d+\W+[\d.]+\W+100\.00", done.stdout)


@pytest.mark.parametrize("bits", low_bits.GRIDS)
def test_few_bits_on_a_small_slice(bits: int, folder: Path) -> None:
    data = example_data.load(folder)
    data = dataclasses.replace(data, name="fashion_mnist")
    found = low_bits.run(data, bits, steps=2, seeds=2, images=12)
    assert {name: len(values) for name, values in found.items()} == {
        "calibrated": 1,
        **dict.fromkeys(torch_ext.fake_quants(), 2),
    }
    levels = 2**bits
    model = low_bits.prepare(net.trained(data.name), bits, "lsq")
    few = [q for q in model.modules() if isinstance(q, torch_ext.LearnedFakeQuantize)]
    assert {q.observer.quant_max - q.observer.quant_min + 1 for q in few} == {levels}
    assert len(few) == 10 + 9  # ReLUs, and weights between the first and the last


def test_the_starts_of_short_training(folder: Path) -> None:
    starts = {
        start: qat_start.train(qat_start.Training(str(folder), 4, "lsq", start, 1e-3, 0, 2, 5))
        for start in qat_start.STARTS
    }
    without = starts[qat_start.STARTS[0]]
    assert math.isnan(without.before)
    assert all(0 <= done.after <= 100 and len(done.losses) == 2 for done in starts.values())
    assert len({done.losses[0] for done in starts.values()}) == 4
    rounded, equalized = (
        qat_start.started(str(folder), 4, start).residual1.body[0].weight.detach()
        for start in qat_start.STARTS[2:]
    )
    for weight in (rounded, equalized):
        assert max(len(channel.unique()) for channel in weight) <= 16
    ratios = equalized.abs().amax((1, 2, 3)) / rounded.abs().amax((1, 2, 3))
    assert float(ratios.max() / ratios.min()) > 1.2  # channels were scaled


@pytest.mark.parametrize(
    "script",
    [
        "fashion_mnist.py",
        "eleven_steps.py",
        "train_float.py",
        "low_bits.py",
        "export_onnx.py",
        "qat_start.py",
    ],
)
def test_wrong_folder_ends_the_script_with_its_name(script: str, tmp_path: Path) -> None:
    done = run_example(f"examples/{script}", "--data", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "there is no such folder" in done.stderr
    assert "Traceback" not in done.stderr
