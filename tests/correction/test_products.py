"""The count of multiplications by quantizer, against torch's own count of operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import torch_ext
from nets.tiny_net import calibrated, images
from torch_ext.correction.widths.products import Product, count_products

pytestmark = pytest.mark.usefixtures("one_thread")


def ready(net: nn.Module, x: Tensor, **keys: Any) -> nn.Module:
    net.qconfig = torch_ext.get_default_qconfig()  # type: ignore[assignment]
    made = torch_ext.prepare_qat(net.eval(), example_inputs=x, **keys)
    torch_ext.calibrate(made, [x], progress=False)
    return made


def products(net: nn.Module, x: Tensor) -> dict[tuple[str | None, str | None], int]:
    quantizers = torch_ext.named_quantizers(net)
    found = count_products(net, quantizers, x, lambda model, batch: model(batch), x.device)
    assert all(isinstance(product, Product) for product in found)
    return {product.factors: product.macs for product in found}


def torchs_count(net: nn.Module, x: Tensor) -> int:
    # torch counts no operations of the fused attention of CPUs.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as mode, torch.no_grad():
        net(x)
    assert mode.get_total_flops() % 2 == 0
    return mode.get_total_flops() // 2


def test_layers_of_a_net() -> None:
    found = products(calibrated(), images(6))
    assert found == {
        ("conv1.input_quantizers.input", "conv1.parametrizations.weight.0"): 6 * 64 * 4 * 9,
        ("conv2.input_quantizers.input", "conv2.parametrizations.weight.0"): 6 * 64 * 4 * 9,
        ("fc.input_quantizers.input", "fc.parametrizations.weight.0"): 6 * 4 * 3,
    }


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 5, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        mixed, _ = self.attention(x, x, x, need_weights=False)
        scores = torch.matmul(mixed, x.transpose(1, 2)) / 3
        return self.out(torch.einsum("bij,bjk->bik", scores.softmax(-1), x))


NETS: dict[str, tuple[Any, Any]] = {
    "grouped and transposed": (
        lambda: nn.Sequential(
            nn.Conv2d(4, 8, 3, stride=2, groups=2),
            nn.ReLU(),
            nn.ConvTranspose2d(8, 6, 3, stride=2, groups=2),
            nn.ConvTranspose2d(6, 2, 2, bias=False),
        ),
        (3, 4, 9, 9),
    ),
    "one and three dimensions": (
        lambda: nn.Sequential(
            nn.Conv1d(3, 4, 3, padding=1),
            nn.ReLU(),
            nn.Linear(7, 5),
            nn.Flatten(),
            nn.Linear(20, 2),
        ),
        (2, 3, 7),
    ),
    "attention": (Attention, (2, 5, 6)),
}


@pytest.mark.parametrize("name", NETS)
def test_as_many_as_torch_counts(name: str) -> None:
    make, shape = NETS[name]
    x = torch.randn(shape)
    net = ready(make(), x)
    found = products(net, x)
    assert sum(found.values()) == torchs_count(net, x)
    named = {factor for factors in found for factor in factors if factor}
    weights = {n for n, q in torch_ext.named_quantizers(net).items() if q.transient}
    assert weights <= named
    for left, right in found:
        if right in weights:
            assert left is not None, right


def test_a_matrix_product_of_two_values() -> None:
    x = torch.randn(2, 5, 6)
    net = ready(Attention(), x)
    both = [f for f in products(net, x) if all(n and "weight" not in n for n in f)]
    assert len(both) >= 2


def test_a_weight_with_its_norm_folded() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    x = torch.randn(2, 3, 5, 5)
    found = products(ready(net, x, fold_batch_norms=True), x)
    ((factors, macs),) = found.items()
    assert None not in factors
    assert macs == 2 * 4 * 9 * 27


def test_recurrent_layers_are_made_of_products() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = nn.LSTM(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.rnn(x)[0]

    x = torch.randn(5, 2, 3)
    net = ready(Net(), x)
    found = products(net, x)
    assert sum(found.values()) == 5 * 2 * 16 * (3 + 4)
    assert {right for _, right in found} == {
        n for n, q in torch_ext.named_quantizers(net).items() if q.transient
    }


def test_a_layer_that_is_left_float_counts_without_a_name() -> None:
    net = calibrated()
    torch_ext.set_fake_quantize(net, "float", pattern="conv1.*")
    assert products(net, images(1))[None, None] == 64 * 4 * 9


def test_quantizers_and_random_state_stay() -> None:
    net = calibrated()
    random = torch.get_rng_state()
    products(net, images())
    assert all("_quantize" not in q.__dict__ for q in torch_ext.named_quantizers(net).values())
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mkldnn.enabled
