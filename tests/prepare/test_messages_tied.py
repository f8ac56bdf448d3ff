"""Weights that are tied, or replaced, after prepare_qat."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from prepare_steps import CONFIG
from snapshots import same_bits
from torch_ext import (
    calibrate,
    get_default_qconfig,
    prepare_qat,
    remove_quantizers,
    set_fake_quantize,
)

pytestmark = pytest.mark.usefixtures("one_thread")

T = torch.randint(0, 10, (3, 5), generator=torch.Generator().manual_seed(1))
MODES = pytest.mark.parametrize("example", [None, T], ids=["plain", "example"])


class Tied(nn.Module):
    """As language models are: the head's weight is the embedding's."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embedding = nn.Embedding(10, 4)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 10, bias=False)

    def tie_weights(self) -> None:
        self.head.weight = self.embedding.weight

    def tie_weights_by_name(self) -> None:
        """As newer libraries do."""
        parameter = self.get_parameter("embedding.weight")
        setattr(self.get_submodule("head"), "weight", parameter)  # noqa: B010

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.body(self.embedding(tokens)).relu())


def ready(example: Tensor | None, *, tied: bool = False, config: Any = CONFIG) -> Any:
    net = Tied().eval()
    if tied:
        net.tie_weights()
    net.qconfig = config  # type: ignore[assignment]
    return prepare_qat(net, example_inputs=example)


def one(net: Any) -> bool:
    chains = (net.head.parametrizations.weight, net.embedding.parametrizations.weight)
    return chains[0].original is chains[1].original


@MODES
@pytest.mark.parametrize("by_name", [False, True])
@pytest.mark.parametrize("before", [False, True])
def test_tie_weights_in_float(example: Tensor | None, before: bool, by_name: bool) -> None:
    net, wanted = ready(example, tied=before), ready(example, tied=True)
    net.tie_weights_by_name() if by_name else net.tie_weights()
    assert one(net)
    assert one(wanted)
    for model in (net, wanted):
        calibrate(model, [T])
    assert same_bits(net(T).detach(), wanted(T).detach())
    assert net.state_dict().keys() == wanted.state_dict().keys()
    assert len(list(net.parameters())) == len(list(wanted.parameters()))
    set_fake_quantize(net, "qat")
    net.train()(T).square().sum().backward()
    assert net.embedding.parametrizations.weight.original.grad is not None
    twin = pickle.loads(pickle.dumps(net))
    assert one(twin)
    assert one(copy.deepcopy(net))
    assert remove_quantizers(net).head.weight is not None


@MODES
@pytest.mark.parametrize("state", ["qat", "validation"])
def test_tie_weights_while_quantized_says_what_to_do(example: Tensor | None, state: Any) -> None:
    net = ready(example)
    calibrate(net, [T], state=state)
    before = net.head.parametrizations.weight.original
    with pytest.raises(
        TypeError, match=r"head\.weight = \.\.\.: expected an nn.Parameter"
    ) as caught:
        net.tie_weights()
    assert net.head.parametrizations.weight.original is before
    for advice in ("parametrizations.weight.original", 'set_fake_quantize(model, "float")'):
        assert advice in str(caught.value)
    by_hand = copy.deepcopy(net)
    by_hand.head.weight = by_hand.embedding.parametrizations.weight.original
    assert one(by_hand)
    set_fake_quantize(net, "float")
    net.tie_weights()
    assert one(net)
    for model in (net, by_hand):
        set_fake_quantize(model, "validation")
    assert same_bits(net(T).detach(), by_hand(T).detach())
    assert same_bits(
        net.head.parametrizations.weight[0].scale, net.embedding.parametrizations.weight[0].scale
    )


@MODES
def test_a_weight_replaced_in_validation_has_its_range(example: Tensor | None) -> None:
    net = ready(example)
    calibrate(net, [T])
    fresh = nn.Parameter(torch.randn(10, 4) * 7)
    net.head.weight = fresh
    chain = net.head.parametrizations.weight
    assert chain.original is fresh
    assert same_bits(chain[0].scale, fresh.detach().abs().amax(1) / 127.5)


@MODES
def test_another_shape_is_refused_and_the_advice_works(example: Tensor | None) -> None:
    net = ready(example)
    calibrate(net, [T])
    with pytest.raises(ValueError, match=r"expected a parameter of shape \[10, 4\].*got \[12, 4\]"):
        net.head.weight = nn.Parameter(torch.randn(12, 4))
    back = remove_quantizers(net)
    back.head.weight = nn.Parameter(torch.randn(12, 4))
    again = prepare_qat(back, example_inputs=example)
    calibrate(again, [T])
    assert again(T).shape == (3, 5, 12)


@MODES
def test_other_attributes_and_parametrizations_stay_as_they_are(example: Tensor | None) -> None:
    net = ready(example)
    net.head.note = "mine"
    net.head.bias = nn.Parameter(torch.ones(10))
    assert net.head.note == "mine"
    assert net.head.bias is dict(net.head.named_parameters())["bias"]
    plain = Tied()
    parametrizations.weight_norm(plain.head)
    plain.qconfig = CONFIG  # type: ignore[assignment]
    made = prepare_qat(plain, example_inputs=example)
    with pytest.raises((KeyError, RuntimeError, NotImplementedError)):  # as torch has it
        made.head.weight = nn.Parameter(torch.ones(10, 4))


@MODES
def test_tied_weights_compile(example: Tensor | None) -> None:
    net = ready(example, config=get_default_qconfig(weight_fake_quant="lsq"))
    net.tie_weights()
    calibrate(net, [T])
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    assert same_bits(compiled(T).detach(), net(T).detach())
