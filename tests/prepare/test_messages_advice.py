"""Each refusal of prepare_qat and of a prepared model, and that what it advises works."""

from __future__ import annotations

import copy
import functools
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import torch_ext
from nets.tiny_net import calibrated, images, tiny_net
from prepare_steps import CONFIG, names
from torch_ext import (
    FakeQuantize,
    QConfig,
    calibrate,
    fuse,
    get_default_qconfig,
    prepare_qat,
    remove_quantizers,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def layers() -> Any:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net.qconfig = CONFIG  # type: ignore[assignment]
    return net


def with_qconfig(net: nn.Module, config: Any = CONFIG) -> nn.Module:
    net.qconfig = config
    return net


def prepare(net: nn.Module, **keys: Any) -> Any:
    return prepare_qat(net, **keys)


def of_instance() -> nn.Module:
    net = layers()
    plain = net.forward
    net.forward = lambda x: plain(x)
    return net


def shared(first: Any, second: Any) -> nn.Module:
    layer = nn.Linear(4, 4)
    net = nn.Sequential(layer, nn.ReLU(), layer)
    return prepare(net, mapping={"0": first, "2": second})


def one_for_all() -> Callable[..., FakeQuantize]:
    made = FakeQuantize()
    return lambda **_: made


def taken(attribute: str) -> nn.Module:
    net = layers()
    setattr(net[0], attribute, "mine")
    return net


def renamed() -> nn.Module:
    net = taken("input_quantizers")
    net[0].mine = net[0].input_quantizers
    del net[0].input_quantizers
    return net


AXIS = {"qscheme": "per_channel_symmetric", "ch_axis": 2}

# What is refused; what the message says; what it advises, which works.
Case = tuple[Callable[[], Any], str, list[Callable[[], Any]]]
CASES: dict[str, Case] = {
    "no qconfig": (
        lambda: prepare(tiny_net()),
        r"found none; set model.qconfig = get_default_qconfig\(\)",
        [lambda: prepare(with_qconfig(tiny_net(), get_default_qconfig()))],
    ),
    "no factory": (
        lambda: prepare(with_qconfig(tiny_net(), QConfig(None, None))),
        "found none with a QConfig that has a factory",
        [lambda: prepare(with_qconfig(tiny_net(), QConfig(None, FakeQuantize)))],
    ),
    "functions alone": (
        lambda: prepare(with_qconfig(Sum())),
        "functions are found with example_inputs",
        [lambda: prepare(with_qconfig(Sum()), example_inputs=(X, X))],
    ),
    "prepared already": (
        lambda: prepare(prepare(layers())),
        r'prepared already \("0.input_quantizers"\); remove_quantizers\(model\) makes it float',
        [lambda: prepare(remove_quantizers(prepare(layers())))],
    ),
    "a script": (
        lambda: prepare(with_qconfig(nn.Sequential(torch.jit.script(nn.Linear(4, 4)), nn.ReLU()))),
        "got a ScriptModule at 0; prepare the model from which it was scripted",
        [lambda: prepare(with_qconfig(nn.Sequential(nn.Linear(4, 4), nn.ReLU())))],
    ),
    "wrapped": (
        lambda: prepare(with_qconfig(nn.DataParallel(layers()))),
        "got a DataParallel; prepare before wrapping",
        [lambda: nn.DataParallel(prepare(layers()))],
    ),
    "a name that is taken": (
        lambda: prepare(taken("input_quantizers")),
        "expected 0 to have no attribute input_quantizers, got a str; rename it, or give the mod",
        [
            lambda: prepare(renamed()),
            lambda: prepare(taken("input_quantizers"), mapping={"0": None}),
        ],
    ),
    "a lazy weight": (
        lambda: prepare(with_qconfig(nn.Sequential(nn.LazyLinear(4)))),
        "0.weight to be initialised, got a lazy one; run a forward first",
        [lambda: prepare(ran(with_qconfig(nn.Sequential(nn.LazyLinear(4)))))],
    ),
    "a sparse embedding": (
        lambda: prepare(with_qconfig(nn.Sequential(nn.Embedding(5, 4, sparse=True), *layers()))),
        "0.weight to have dense gradients and no max_norm, got sparse=True.*qconfig=None",
        [
            lambda: prepare(
                with_qconfig(nn.Sequential(nn.Embedding(5, 4, sparse=True), *layers())),
                mapping={"0": None},
            )
        ],
    ),
    "an axis that is not there": (
        lambda: prepare(with_qconfig(layers(), get_default_qconfig(weight_qkwargs=AXIS))),
        "ch_axis to be below 2, got 2; 0 means the output channels of every layer",
        [
            lambda: prepare(
                with_qconfig(layers(), get_default_qconfig(weight_qkwargs=AXIS | {"ch_axis": 0}))
            )
        ],
    ),
    "a factory of something else": (
        lambda: prepare(with_qconfig(layers(), QConfig(nn.ReLU, None))),
        r"make a FakeQuantize, got a module ReLU; pass one such as functools.partial\(FakeQ",
        [lambda: prepare(with_qconfig(layers(), QConfig(functools.partial(FakeQuantize), None)))],
    ),
    "a factory that repeats itself": (
        lambda: prepare(with_qconfig(layers(), QConfig(one_for_all(), None))),
        "got one that it made before; pass one such as functools.partial",
        [lambda: prepare(with_qconfig(layers(), QConfig(functools.partial(FakeQuantize), None)))],
    ),
    "two qconfigs of one module": (
        lambda: shared(CONFIG, get_default_qconfig()),
        '"0" and "2" are one module, but have different qconfigs; give both names the same',
        [lambda: shared(CONFIG, CONFIG)],
    ),
    "fold without an example": (
        lambda: prepare(with_qconfig(tiny_net()), fold_batch_norms=True),
        "got None; pass a batch, or fold the norms for good with fuse",
        [
            lambda: prepare(
                with_qconfig(tiny_net()), fold_batch_norms=True, example_inputs=images()
            ),
            lambda: prepare(fuse(with_qconfig(tiny_net()), example_inputs=images())),
        ],
    ),
    "a forward of the instance": (
        lambda: prepare(of_instance(), example_inputs=X),
        "call prepare_qat without example_inputs, or give the class a forward",
        [lambda: prepare(of_instance()), lambda: prepare(layers(), example_inputs=X)],
    ),
    "fuse after prepare": (
        lambda: fuse(prepare(with_qconfig(tiny_net()))),
        "fuse before prepare_qat",
        [lambda: prepare(fuse(with_qconfig(tiny_net())))],
    ),
    "an iterator that is used up": (
        lambda: calibrate(prepare(layers()), iter([])),
        "an iterator gives them once: pass a list or a DataLoader",
        [lambda: calibrate(prepare(layers()), [X])],
    ),
    "a name of nothing": (
        lambda: prepare(layers(), mapping={"fc": None}),
        'no module is named "fc" as in mapping; known: 0, 1, 2',
        [lambda: prepare(layers(), mapping={"0": None})],
    ),
}


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def ran(net: nn.Module) -> nn.Module:
    net(X)
    return net


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore:fuse. batch norms left")
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_what_a_refusal_advises_works(case: str) -> None:
    refused, text, advice = CASES[case]
    with pytest.raises((TypeError, ValueError), match=text):
        refused()
    for follow in advice:
        made = follow()
        if isinstance(made, nn.Module):
            assert names(made)


class Twice(nn.Module):
    """Calls one layer twice, with two values."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.checkpointed: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x).relu()
        if self.training:
            x = checkpoint(self.layer, x, use_reentrant=False)
            return x.square()
        return self.layer(x).square()


def test_a_part_that_is_called_with_different_quantizers() -> None:
    net = prepare(with_qconfig(Twice().eval()), example_inputs=X)
    calibrate(net, [X])
    with pytest.raises(RuntimeError, match='expected "layer" to be called by the model') as caught:
        net.layer(X)
    for advice in ("call the model", 'set_fake_quantize(model, "float")', "checkpoint the module"):
        assert advice in str(caught.value)
    net(X)
    set_fake_quantize(net, "float")
    net.layer(X)
    set_fake_quantize(net, "qat")
    with pytest.raises(RuntimeError, match="checkpoint the module that calls it"):
        net.train()(X).sum().backward()
    outer = prepare(with_qconfig(nn.Sequential(Twice(), nn.Linear(4, 2))), example_inputs=X)
    calibrate(outer, [X], state="qat")
    checkpoint(outer[0].eval(), X.requires_grad_(), use_reentrant=False).sum().backward()


def test_a_part_copied_without_its_model() -> None:
    net = prepare(with_qconfig(tiny_net().eval()), example_inputs=images())
    calibrate(net, [images()])
    with pytest.raises(RuntimeError, match="copy and keep the whole model"):
        copy.deepcopy(net.conv1)(images())
    twin = copy.deepcopy(net)
    twin.conv1(images())


def test_pickle_with_other_parametrizations(tmp_path: Path) -> None:
    def make() -> Any:
        net = layers()
        parametrizations.weight_norm(net[0])
        return prepare(net)

    net = make()
    calibrate(net, [X])
    with pytest.raises(RuntimeError, match=r"save state_dict\(\) and load it into prepare_qat of"):
        pickle.dumps(net)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    other = make()
    set_fake_quantize(other, "validation", allow_unobserved=True)
    other.load_state_dict(torch.load(tmp_path / "net.pt"))
    assert torch.equal(other(X), net(X))


def test_states_that_are_refused() -> None:
    net = prepare(layers())
    with pytest.raises(RuntimeError, match="calibrate, train or load_observer_params first, or"):
        set_fake_quantize(net, "validation")
    set_fake_quantize(net, "calibration")
    with pytest.raises(RuntimeError, match="run data through them, or pass allow_unobserved=True"):
        set_fake_quantize(net, "validation")
    set_fake_quantize(copy.deepcopy(net), "validation", allow_unobserved=True)
    net(X)
    set_fake_quantize(net, "validation")
    set_fake_quantize(net, "qat")
    with pytest.raises(RuntimeError, match='call set_fake_quantize\\(model, "validation"\\) first'):
        torch.export.export(net, (X,))
    set_fake_quantize(net, "validation")
    torch.export.export(net, (X,))


def test_a_checkpoint_of_other_batches(tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    batches = [torch.randn(2, 4) for _ in range(4)]

    class StopError(Exception):
        pass

    def stops(model: nn.Module, batch: Tensor) -> None:
        if batch is batches[3]:
            raise StopError
        model(batch)

    net = prepare(layers())
    with pytest.raises(StopError):
        calibrate(net, batches, forward=stops, checkpoint=path, every=1, device="cpu")
    for other in ([torch.zeros(2, 4)] * 4, batches[:2]):
        with pytest.raises(ValueError, match="give the same again, or delete the file"):
            calibrate(net, other, checkpoint=path, every=1)
    assert calibrate(copy.deepcopy(net), batches, checkpoint=path).resumed_from == 3
    path.unlink(missing_ok=True)
    calibrate(net, batches[:2], checkpoint=path)


def test_warnings_show_the_users_line(tmp_path: Path) -> None:
    source, target = calibrated().eval(), prepare(with_qconfig(tiny_net()))
    torch.save(source.state_dict(), tmp_path / "net.pt")
    state = torch.load(tmp_path / "net.pt")
    actions: list[Callable[[], Any]] = [
        lambda: target.load_state_dict(state),
        lambda: fuse(tiny_net().bn1),
        lambda: prepare(with_qconfig(tiny_net()), example_inputs=images(), fold_batch_norms=True),
        lambda: calibrate(prepare(with_qconfig(Writes())), [X]),
        lambda: calibrate(prepare(layers()), [torch.zeros(2, 4)]),
    ]
    for action in actions:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            action()
        ours = [w for w in caught if str(w.message).startswith(("load_", "fuse", "prep", "cal"))]
        assert all(w.filename == __file__ for w in ours), [w.filename for w in ours]
    assert torch_ext is not None


class Writes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.steps += 1
        return self.layer(x)
