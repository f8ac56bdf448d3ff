"""What the README says is true, links lead somewhere, and the header of `docs/guides/adding.md` is
all that an observer needs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import torch_ext
from paths import ROOT

BUILD = ROOT / "build" / "current"
SEARCH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
README = (ROOT / "README.md").read_text()
ADDING = (ROOT / "docs" / "guides" / "adding.md").read_text()
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def block(text: str, language: str) -> str:
    """The first code block of a language."""
    match = re.search(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert match, f"expected a {language} block"
    return match[1]


def table(header: str) -> list[list[str]]:
    """The cells of the table that begins with `header`, row by row."""
    lines = README[README.index(header) :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_snippet_prints_what_is_shown(tmp_path: Path) -> None:
    """Words exactly; numbers within 5 %, because kernels differ in the last bits by machine."""
    script = tmp_path / "snippet.py"
    script.write_text(block(README, "python"))
    done = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    shown = block(README, "text")
    assert NUMBER.sub("#", done.stdout) == NUMBER.sub("#", shown)
    printed = [float(number) for number in NUMBER.findall(done.stdout)]
    assert printed == pytest.approx([float(number) for number in NUMBER.findall(shown)], rel=0.05)


def test_table_has_every_rule() -> None:
    assert tuple(row[0].strip("`") for row in table("| rule |")) == torch_ext.observers()


def test_table_has_every_state() -> None:
    names = {row[0].strip("`") for row in table("| state |")}
    assert names == {state.name for state in torch_ext.FakeQuantState}


def test_map_names_every_folder() -> None:
    shown = set(re.findall(r"`([\w/]+/)`", README[README.index("| folder |") :].split("\n\n")[0]))
    for folder in shown:
        assert (ROOT / folder).is_dir(), folder
    layers = {f"csrc/{path.name}/" for path in (ROOT / "csrc").iterdir() if path.is_dir()}
    packages = {f"torch_ext/{path.parent.name}/" for path in ROOT.glob("torch_ext/*/__init__.py")}
    assert layers | packages <= shown


def test_measured_figures_are_those_of_the_guide() -> None:
    guide = (ROOT / "docs" / "reference" / "measurements.md").read_text()
    known = set(NUMBER.findall(guide))
    start = README.index("## Measured")
    figures = set(NUMBER.findall(README[start : README.index("##", start + 2)]))
    figures -= {"8", "4"}  # of INT8 and INT4
    assert figures
    assert figures <= known, figures - known


PAGES = ("README.md", "CONTRIBUTING.md", "csrc/README.md", "examples/README.md")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)#:]+)[^)]*\)", (ROOT / page).read_text())
    assert links
    for link in links:
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_links_lead_to_every_page_of_the_guide() -> None:
    links = set(re.findall(r"\]\((docs/[^)#]+\.md)\)", README))
    assert links == {str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md")}


# A method whose range is half its parameter; as the one of the papers, but for that.
HALF = """#pragma once
#include "core/learned.h"
#include "core/qparams.h"
#include "fake_quant/pact.h"

namespace torch_ext::fake_quant {
struct Half : Pact {
  static constexpr const char* name = "half";
  static constexpr const char* parameter = "width";
  static constexpr double start = 8;
  TE_HD static float effective(float width) { return Pact::effective(width / 2); }
  template <typename T>
  TE_HD static core::UnitGrid<T> unit_grid(float width, int32_t n, const core::Codes& codes) {
    return Pact::unit_grid<T>(width / 2, n, codes);
  }
};
static_assert(core::LearnedFakeQuant<Half>);
}  // namespace torch_ext::fake_quant
"""


def copy(source: Path, target: Path) -> None:
    """Copies what changed, with its time, so that the build in the copy stays incremental."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "registry.h")
    shutil.copytree(source, target, ignore=ignore, dirs_exist_ok=True)


def write(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


@pytest.fixture(scope="module")
def scratch() -> Path:
    """A copy with the guide's observer and a fake-quant: headers, and lines in the registry.

    The bindings are not compiled again: they read a table, so their objects serve as they are.
    """
    cmake, ninja = (shutil.which(name, path=SEARCH) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None or not (BUILD / "build.ninja").is_file():
        pytest.skip("needs the build tree of `make`, cmake and ninja")
    folder = ROOT / "build" / "toy_observer"
    for name in ("cmake", "csrc", "torch_ext"):
        copy(ROOT / name, folder / name)
    write(folder / "CMakeLists.txt", (ROOT / "CMakeLists.txt").read_text())
    write(folder / "csrc/observers/shrink.h", block(ADDING, "cpp"))
    registry = (ROOT / "csrc/registry.h").read_text()
    registry = registry.replace("#include", '#include "observers/shrink.h"\n#include', 1)
    registry, listed = re.subn(
        r"(Observers = List<[^;]*)>;", r"\1, observers::Shrink>;", registry, count=1
    )
    assert listed == 1
    write(folder / "csrc/fake_quant/half.h", HALF)
    registry = registry.replace("#include", '#include "fake_quant/half.h"\n#include', 1)
    registry, listed = re.subn(
        r"(using FakeQuants = List<[^;]*)>;", r"\1, fake_quant::Half>;", registry, count=1
    )
    assert listed == 1
    write(folder / "csrc/registry.h", registry)

    build = folder / "build"
    torch_root = Path(torch.__file__).parent
    options = [f"-DPython3_EXECUTABLE={sys.executable}", f"-DTORCH_ROOT={torch_root}"]
    options += [f"-DCMAKE_MAKE_PROGRAM={ninja}", "-GNinja"]
    jobs = os.environ.get("JOBS") or str(os.cpu_count())
    run = partial(subprocess.run, check=True, timeout=600)
    run([cmake, "-S", folder, "-B", build, *options])
    run([cmake, "--build", build, "--target", "torch_ext_kernels", "--parallel", jobs])
    kernels = "libtorch_ext_kernels.a"
    for library in ("libtorch_ext.so", Path(torch_ext._C.__file__).name):
        commands = [ninja, "-C", BUILD, "-t", "commands", "-s", library]
        link = subprocess.check_output(commands, text=True).splitlines()[-1]
        assert f" {kernels} " in link
        link = link.replace(f" {kernels} ", f" '{build / kernels}' ")
        link = link.replace(f"-o {library} ", f"-o '{folder / 'torch_ext' / library}' ")
        run(link, shell=True, cwd=BUILD)
    return folder


def test_one_header_and_one_line_add_an_observer(scratch: Path) -> None:
    """Op, one-shot op, Observer, qconfig and saving have it, and nothing else was touched."""
    program = """
import torch, torch_ext
from torch_ext import FakeQuantState, ops
assert torch_ext.__file__.startswith({scratch!r}), torch_ext.__file__
assert torch_ext.observers()[-1] == "shrink"
x = torch.tensor([-2.0, 1, 0, 3, 8, -4])
want = torch.tensor([[-4.0, 8.0]]) * 0.9
assert torch.allclose(ops.shrink(x), want)
observer = torch_ext.Observer("shrink")
observer(x)
assert torch.allclose(observer.range(), want)
model = torch.nn.Sequential(torch.nn.Linear(6, 2))
model.qconfig = torch_ext.get_default_qconfig(
    activation_observer="shrink", weight_observer="shrink"
)
model = torch_ext.prepare_qat(model)
torch_ext.set_fake_quantize(model, FakeQuantState.CALIBRATION)
model(x[None])
torch_ext.set_fake_quantize(model, FakeQuantState.VALIDATION)
torch_ext.save_observer_params(model, {path!r})
quantizers = [m for m in model.modules() if isinstance(m, torch_ext.FakeQuantize)]
assert any(torch.allclose(q.range, want) for q in quantizers)
"""
    script = scratch / "try_shrink.py"
    write(script, program.format(scratch=str(scratch), path=str(scratch / "params.safetensors")))
    environment = os.environ | {"PYTHONPATH": str(scratch)}
    subprocess.run(
        [sys.executable, str(script)], cwd=scratch, env=environment, check=True, timeout=300
    )


def test_one_header_and_one_line_add_a_fake_quant(scratch: Path) -> None:
    """Op, quantizer, qconfig and training have it, and nothing else was touched."""
    program = """
import torch, torch_ext
assert torch_ext.__file__.startswith({scratch!r}), torch_ext.__file__
assert torch_ext.fake_quants()[-1] == "half"
x = torch.tensor([-9.0, -1.0, 0.5, 9.0], requires_grad=True)
width = torch.tensor([8.0], requires_grad=True)
out = torch.ops.torch_ext.half(x, width, "[-127,127]")
out.sum().backward()
assert torch.equal(out, torch_ext.ops.pact(x, torch.tensor([4.0]), -127, 127))
assert x.grad.tolist() == [0, 1, 1, 0] and width.grad.tolist() == [0]
model = torch.nn.Sequential(torch.nn.Linear(6, 2))
model.qconfig = torch_ext.get_default_qconfig("half", "lsq")
model = torch_ext.prepare_qat(model)
torch_ext.set_fake_quantize(model, "qat")
optimizer = torch.optim.SGD(torch_ext.quantization_parameters(model), lr=0.1)
(model(torch.randn(3, 6) * 30)).square().sum().backward()
optimizer.step()
quantizer = model[0].input_quantizers.input
assert quantizer.width.item() != 8 and quantizer.width.grad.item() != 0
assert torch.allclose(quantizer.scale, quantizer.width / 255)
"""
    script = scratch / "try_half.py"
    write(script, program.format(scratch=str(scratch)))
    environment = os.environ | {"PYTHONPATH": str(scratch)}
    subprocess.run(
        [sys.executable, str(script)], cwd=scratch, env=environment, check=True, timeout=300
    )
