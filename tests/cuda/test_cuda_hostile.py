"""Input sequences that break observers in the field: the same states and refusals as on the CPU."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torch_ext
from devices import assert_same_bits, to
from hostile_batches import SCHEMES, SEQUENCES, as_dtype, refused
from op_samples import SAMPLES
from sample_data import DTYPES
from torch_ext import FakeQuantState

RULES = torch_ext.observers()


def fed(module: nn.Module, batches: list[Tensor], where: torch.device | str) -> list[Any]:
    """For every batch the refusal's text, or None; then what the module gives and holds."""
    module.to(where)
    found: list[Any] = []
    for batch in batches:
        text = refused(module, batch.detach().to(where).requires_grad_(batch.requires_grad))
        found.append(text and text.replace(str(where), "cpu"))
    observer = getattr(module, "observer", module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing finite was seen: said, and scale 1
        return [*found, module.state_dict(), observer.range(), *observer.calculate_qparams()]


# All schemes in float32; the other types once.
CASES = [(torch.float32, s) for s in SCHEMES] + [(t, "per_channel") for t in DTYPES[1:]]


@pytest.mark.parametrize(("dtype", "scheme"), CASES, ids=str)
@pytest.mark.parametrize("name", sorted(SEQUENCES))
def test_observers(name: str, dtype: torch.dtype, scheme: str, device: torch.device):
    batches = as_dtype(SEQUENCES[name](), dtype)
    for rule in RULES:
        have, want = (
            fed(torch_ext.Observer(rule, **SCHEMES[scheme]), batches, where)
            for where in (device, "cpu")
        )
        assert_same_bits(have, want, rule)


def in_training(rule: str, scheme: str) -> torch_ext.FakeQuantize:
    quantizer = torch_ext.FakeQuantize("fake_quant", rule, **SCHEMES[scheme])
    quantizer.state = FakeQuantState.QAT
    return quantizer


@pytest.mark.parametrize("scheme", ["affine", "per_channel"])
@pytest.mark.parametrize("name", sorted(SEQUENCES))
def test_quantizers_in_training(name: str, scheme: str, device: torch.device):
    for rule in ("min_max", "percentile", "kl", "mse"):
        batches = SEQUENCES[name]()
        have, want = (fed(in_training(rule, scheme), batches, where) for where in (device, "cpu"))
        assert_same_bits(have, want, rule)


@pytest.mark.parametrize("op", sorted(SAMPLES))
def test_opcheck(op: str, device: torch.device):
    """Torch's own checks: schema, autograd registration, fake tensors, AOT dispatch."""
    checked: Any = getattr(torch.ops.torch_ext, op).default
    for make in SAMPLES[op][:2]:
        result = torch.library.opcheck(checked, (), to(make(), device))
        assert set(result.values()) == {"SUCCESS"}
