"""What quantizers cost a forward in eager: the prepared model against the float one, by state.

Beside it PT2E's prepared graph, whose observers and fake-quants are torchao's own.
"""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from case import Case, Job, Missing, Peer, expect
from torch_ext import get_default_qconfig, prepare_qat, set_fake_quantize

SIDE = 32
CALL, STEP = 1, 32  # images of a call in eval mode, and of a step of training
# The nets of the tests, which also run next to a CPU build of torch.
HELPERS = Path(__file__).parents[2] / "tests" / "helpers"
VIT = {"img_size": SIDE, "patch_size": 8, "num_classes": 10}


def plain_cnn() -> nn.Module:
    """Layers one after the other: nothing in it needs a function mode."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((3, 16, 1), (16, 16, 1), (16, 32, 2), (32, 64, 2)):
        conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        layers += [conv, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def published(name: str) -> nn.Module:
    """A net of torchvision or timm."""
    for package in ("torchvision", "timm", "pytest"):
        if importlib.util.find_spec(package) is None:
            raise Missing(f"needs {package}")
    if str(HELPERS) not in sys.path:
        sys.path.append(str(HELPERS))
    from nets.architectures import architecture
    from zoo import operators

    if name != "vit_tiny":
        return architecture(name)[0]
    operators.declare()
    import timm

    made: nn.Module = timm.create_model("vit_tiny_patch16_224", **VIT)
    return made


NETS: dict[str, Callable[[], nn.Module]] = {
    "plain CNN": plain_cnn,
    **{
        name: functools.partial(published, name)
        for name in ("resnet18", "mobilenet_v3_small", "vit_tiny")
    },
}


def images(count: int) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))


@functools.cache
def float_net(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETS[name]()


@functools.cache
def prepared_net(name: str) -> nn.Module:
    """Calibrated; each case changes the state of a copy."""
    model = copy.deepcopy(float_net(name)).train()
    model.qconfig = get_default_qconfig()
    prepared = prepare_qat(model, example_inputs=(images(STEP),)).eval()
    set_fake_quantize(prepared, "calibration")
    prepared(images(STEP))
    return prepared


@functools.cache
def pt2e_net(name: str, state: str) -> Callable[[Tensor], Any]:
    """PT2E's graph with the default configuration for x86: calibrating, training or fixed."""
    try:
        from torchao.quantization import pt2e
        from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e, prepare_qat_pt2e
        from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86
    except ImportError as error:
        raise Missing("needs torchao") from error
    qat, train = state != "calibration", state == "qat"
    model = copy.deepcopy(float_net(name)).train(train)
    x = images(STEP if train else CALL)
    config = x86.get_default_x86_inductor_quantization_config(is_qat=qat)
    quantizer = x86.X86InductorQuantizer().set_global(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.export.export(model, (x,), strict=True).module()
        prepared = (prepare_qat_pt2e if qat else prepare_pt2e)(graph, quantizer)
    prepared(x)
    if state == "validation":
        prepared.apply(pt2e.disable_observer)
    return prepared  # type: ignore[no-any-return]


@torch.enable_grad()
def step(model: Any, x: Tensor) -> Tensor:
    """Forward and backward; gradients are given up, not added."""
    for parameter in model.parameters():
        parameter.grad = None
    out: Tensor = model(x)
    out.square().mean().backward()
    return out.detach()


def cost(name: str, kind: str, state: str, _: int) -> Job:
    train = kind == "step"
    x = images(STEP if train else CALL)
    plain = copy.deepcopy(float_net(name)).train(train)
    ours = copy.deepcopy(prepared_net(name)).train(train)
    set_fake_quantize(ours, state)
    run = step if train else (lambda model, x: model(x))

    def check() -> None:
        same = torch.equal(*(one.eval()(x) for one in (copy.deepcopy(ours), copy.deepcopy(plain))))
        expect(same == (state in ("float", "calibration")), "outputs, unless it quantizes")

    peers = [Peer("the float model", functools.partial(run, plain, x))]
    if state != "float":
        peers.append(
            Peer("PT2E's prepared graph", functools.partial(run, pt2e_net(name, state), x))
        )
    return Job(functools.partial(run, ours, x), tuple(peers), check=check)


MEASURED = (
    ("call", "float"),
    ("call", "calibration"),
    ("call", "validation"),
    ("step", "float"),
    ("step", "qat"),
)
CASES = tuple(
    Case(f"insertion/{name} {kind} {state}", functools.partial(cost, name, kind, state), False)
    for name in NETS
    for kind, state in MEASURED
)
