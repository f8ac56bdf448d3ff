"""The page of a report: what stands in it, and that a browser shows and sorts it."""

from __future__ import annotations

import html.parser
import itertools
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from browser import run_page
from nets.tiny_net import ACTIVATIONS, WEIGHTS, calibrated, tiny_net
from torch_ext import get_default_qconfig, prepare_qat, report, set_fake_quantize

LAYERS = 150


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for each other


class Row(NamedTuple):
    keys: list[str]  # what it is sorted by
    cells: list[str]


class Page(html.parser.HTMLParser):
    """The overview's rows, and counts of what else there is; tags have to close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.head: list[str] = []
        self.rows: list[Row] = []
        self.attributes: dict[str, str | None] = {}  # of the body
        self.counts: dict[str, int] = {}
        self._open: list[str] = []
        self._overview = False
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        own = dict(attrs)
        self.counts[tag] = self.counts.get(tag, 0) + 1
        for key in ("src", "href", "data", "action", "srcset"):
            assert (own.get(key) or "#").startswith("#"), own
        assert not any(key.startswith("on") for key in own)
        if tag not in ("meta", "input", "br"):
            self._open.append(tag)
        if tag == "body":
            self.attributes = own
        if tag == "table":
            self._overview = own.get("id") == "overview"
        if self._overview and tag == "tr" and "data-name" in own:
            self.rows.append(Row([], []))
        if self._overview and tag == "td":
            self.rows[-1].keys.append(own["data-v"] or "")
            self.rows[-1].cells.append("")
        if self._overview and tag == "th":
            self.head.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._overview and "td" in self._open:
            self.rows[-1].cells[-1] += data
        elif self._overview and "th" in self._open:
            self.head[-1] += data

    def column(self, name: str) -> list[str]:
        return [row.keys[self.head.index(name)] for row in self.rows]


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of a net with 300 quantizers, two of which deserve a warning."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(4)
    net = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))
    with torch.no_grad():
        for layer in net:
            layer.weight.copy_(torch.randn(8, 8, generator=generator) / 8**0.5)  # type: ignore[union-attr]
        net[3].weight.zero_()  # type: ignore[union-attr, operator]
        net[3].bias.zero_()  # type: ignore[union-attr, operator]
    net.qconfig = get_default_qconfig(activation_observer="percentile")  # type: ignore[assignment]
    net = prepare_qat(net)
    set_fake_quantize(net, "calibration")
    with torch.no_grad():
        net(torch.randn(200, 8, generator=generator))
    with pytest.warns(torch_ext.QuantizationWarning, match="nothing to scale"):
        set_fake_quantize(net, "validation")
    path = tmp_path_factory.mktemp("report") / "report.html"
    report(net, path)
    return path


def test_a_large_report_is_complete_and_small(large: Path) -> None:
    page = read(large)
    assert len(page.rows) == page.counts["details"] == 2 * LAYERS
    assert page.counts["svg"] == 2 * LAYERS - 2  # one layer computes zeros from zeros
    assert large.stat().st_size < 5e6
    assert len(set(page.column("quantizer"))) == len(page.rows)
    assert "Content-Security-Policy" in large.read_text()


def test_a_browser_shows_pictures_and_sorts(large: Path, tmp_path: Path) -> None:
    script = """
      const body = document.body, heads = [...document.querySelectorAll("#overview th")];
      heads.find(head => head.textContent === "SQNR, dB").click();
      const rows = document.querySelectorAll("#overview tbody tr");
      body.dataset.first = rows[0].dataset.name;
      body.dataset.ascending = [...rows].map(row => row.cells[8].dataset.v).join(" ");
      heads.find(head => head.textContent === "quantizer").click();
      heads.find(head => head.textContent === "quantizer").click();
      location.hash = "#q20";
      dispatchEvent(new Event("hashchange"));
      const box = document.querySelector("#q20 svg").getBoundingClientRect();
      body.dataset.box = [box.width, box.height].join(" ");
      body.dataset.opened = document.getElementById("q20").open;
      body.dataset.loaded = performance.getEntriesByType("resource").length;
      const filter = document.getElementById("filter");
      filter.value = "149.PARAM";
      filter.dispatchEvent(new Event("input"));
      body.dataset.shown = [...rows].filter(row => row.offsetHeight).length;
      filter.value = "";
      filter.dispatchEvent(new Event("input"));
      const photographed = ["q20", "q21", "q22", "q23"];
      for (const part of body.children) part.hidden = !photographed.includes(part.id);
      for (const id of photographed) document.getElementById(id).open = true;
      scrollTo(0, 0);
    """
    picture = tmp_path / "page.png"
    page = Page(run_page(large, script, picture))
    have = page.attributes
    assert len(page.rows) == 2 * LAYERS
    values = (have["data-ascending"] or "").split()
    assert len(values) == 2 * LAYERS - 2  # what has no number is last, and empty
    numbers = [float(value) for value in values]
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > LAYERS
    names = page.column("quantizer")
    assert names == sorted(names, reverse=True)
    width, height = map(float, (have["data-box"] or "").split())
    assert width > 600
    assert height > 300
    assert have["data-opened"] == "true"
    assert have["data-loaded"] == "0"
    assert have["data-shown"] == "1"
    assert_drawn(picture)


def assert_drawn(picture: Path) -> None:
    """The colours of histogram bars, of rules, and of text are there in earnest."""
    image = pytest.importorskip("matplotlib.image").imread(picture)
    pixels = (image[..., :3] * 255).round().astype(int).reshape(-1, 3)
    codes, counts = torch.unique(
        torch.from_numpy(pixels) @ torch.tensor([65536, 256, 1]), return_counts=True
    )
    found = dict(zip(codes.tolist(), counts.tolist(), strict=True))
    assert found[0xFFFFFF] < 0.98 * len(pixels)
    for colour in (0x111111, 0x0072B2, 0xD55E00, 0xB9A3C9, 0x8FB3D9):
        assert found.get(colour, 0) > 20, hex(colour)


def test_names_are_text(tmp_path: Path) -> None:
    """A module may have any name but for dots."""
    hostile = '<script>alert("1")</script>&\'x'
    net = nn.Module()
    net.add_module(hostile, tiny_net())
    net.forward = lambda x: getattr(net, hostile)(x)  # type: ignore[method-assign]
    net.qconfig = get_default_qconfig(activation_observer="percentile")  # type: ignore[assignment]
    prepared = prepare_qat(net, inplace=True, input_qconfig=None)
    set_fake_quantize(prepared, "calibration")
    prepared(torch.randn(2, 1, 8, 8))
    report(prepared, tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    assert page.counts["script"] == 1
    assert f"{hostile}.fc.input_quantizers.input" in page.column("quantizer")


def test_a_file_gives_what_the_model_gives_but_for_weights(tmp_path: Path) -> None:
    net = calibrated(get_default_qconfig(activation_observer="percentile"))
    torch_ext.save_observer_params(net, tmp_path / "params.safetensors")
    summary = report(net, tmp_path / "model.html")
    from_file = report(tmp_path / "params.safetensors", tmp_path / "file.html")
    assert summary.quantizers == from_file.quantizers == len(ACTIVATIONS + WEIGHTS)
    pages = {}
    for name in ("model", "file"):
        page = read(tmp_path / f"{name}.html")
        pages[name] = {row.cells[0]: row.cells for row in page.rows}
        assert page.counts["svg"] == len(ACTIVATIONS) + len(WEIGHTS) * (name == "model")
    for name in ACTIVATIONS:
        assert pages["model"][name] == pages["file"][name]
    for name in WEIGHTS:
        assert pages["model"][name][:7] == pages["file"][name][:7]


def test_cells_are_the_model_s(tmp_path: Path) -> None:
    net = calibrated(get_default_qconfig(activation_observer="percentile"))
    report(net, tmp_path / "page.html")
    page = read(tmp_path / "page.html")
    keys = {row.keys[0]: dict(zip(page.head, row.keys, strict=True)) for row in page.rows}
    for name, quantizer in torch_ext.quantizers.find.named_quantizers(net).items():
        own = keys[name]
        assert float(own["low"]) == float(quantizer.range[:, 0].min())
        assert float(own["high"]) == float(quantizer.range[:, 1].max())
        assert float(own["scale"]) == float(quantizer.scale.max())
    assert keys["fc.input_quantizers.input"]["of"] == "input"
    assert keys["fc.input_quantizers.input"]["rule"] == "percentile(99.99)"
    assert keys["fc.parametrizations.weight.0"]["grid"] == "int8 [-128, 127], per channel symmetric"
    assert keys["conv1.input_quantizers.input"]["of"] == "input"


def pairs() -> list[Tensor]:
    return list(itertools.repeat(torch.randn(2, 1, 8, 8), 2))


def test_bars_on_request_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = calibrated(get_default_qconfig(activation_observer="percentile"))
    report(net, tmp_path / "page.html", pairs())
    assert capsys.readouterr() == ("", "")
    report(net, tmp_path / "page.html", pairs(), progress=True)
    shown = capsys.readouterr().err
    assert "report, data" in shown
    assert "2/2" in shown
    assert "8/8" in shown
