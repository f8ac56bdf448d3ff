"""Every clause of every op's contract, violated once: a readable exception, and nothing changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from op_clauses import CLAUSES
from op_samples import SAMPLES, Arguments

NATIVE = torch.ops.torch_ext


def cases() -> Iterator[Any]:
    for op, clauses in CLAUSES.items():
        for what, named, wrong in clauses:
            yield pytest.param(op, named, wrong, id=f"{op}-{what.replace(' ', '_')}")


# A part of a public op speaks by the name that users know.
PUBLIC = {
    "_fake_quant_forward": "fake_quant",
    "_dynamic_fake_quant_forward": "dynamic_fake_quant",
    "_follow_fake_quant_forward": "follow_fake_quant",
    "learned_fake_quant": "lsq",  # the method of its sample
    "_learned_fake_quant_backward": "lsq",
    "_learned_fake_quant_tangent": "lsq",
}


def assert_lists_the_known(text: str, op: str, first: str, wrong: dict[str, Any]) -> None:
    """An unknown name is quoted back, beside all names that there are."""
    value = next(iter(wrong.values()))
    name = value if isinstance(value, str) else value[-1]
    assert text.startswith(f"{op}: "), text
    assert re.search(rf"(known: |one of ){first}, ", text), text
    assert text.endswith(f"got {name}") or f'"{name}"' in text, text


def tensors_of(arguments: Arguments) -> list[Tensor]:
    found: list[Tensor] = []
    for value in arguments.values():
        found += [v for v in (value if isinstance(value, list) else [value]) if torch.is_tensor(v)]
    return found


@pytest.mark.parametrize(("op", "named", "wrong"), list(cases()))
def test_clause(op: str, named: str, wrong: dict[str, Any]):
    call: Callable[..., Any] = getattr(NATIVE, op)
    arguments = SAMPLES[op][0]() | wrong
    before = [t.clone() for t in tensors_of(arguments)]
    with pytest.raises((RuntimeError, ValueError)) as raised:
        call(**arguments)
    text = str(raised.value).splitlines()[0]
    public = PUBLIC.get(op, op)
    if "method" in wrong:
        public = "learned_fake_quant" if named.startswith("known") else wrong["method"]
        named = named.removeprefix(f"{public}: ")
    if named.startswith("known: "):
        assert_lists_the_known(text, public, named.removeprefix("known: "), wrong)
    else:
        assert re.match(rf"{public}: expected .*\b({named})\b.* to be .+, got .+", text), text
    for tensor, old in zip(tensors_of(arguments), before, strict=True):
        assert tensor.equal(old) or tensor.isnan().any(), "an argument changed"


def on_meta(value: Any) -> Any:
    if isinstance(value, list):
        return [on_meta(v) for v in value]
    if not torch.is_tensor(value):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


@pytest.mark.parametrize(("op", "named", "wrong"), list(cases()))
def test_clause_while_tracing(op: str, named: str, wrong: dict[str, Any]):
    """Meta kernels raise what the real ones raise, apart from what is wrong with values."""
    given = SAMPLES[op][0]() | wrong
    traced = {name: on_meta(value) for name, value in given.items()}
    call: Callable[..., Any] = getattr(NATIVE, op)
    with pytest.raises((RuntimeError, ValueError)) as raised:
        call(**given)
    text = str(raised.value).splitlines()[0]
    if re.search(r" in (channel|row) \d|tensor_scale to be between", text):
        call(**traced)
        return
    with pytest.raises((RuntimeError, ValueError)) as raised:
        call(**traced)
    assert str(raised.value).splitlines()[0] == text


def test_every_op_has_its_clauses():
    """An op that is added must be given its contract here."""
    names = {
        n.removeprefix("torch_ext::").partition(".")[0]
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("torch_ext::")
    }
    assert names == set(CLAUSES) == set(SAMPLES)


@pytest.mark.parametrize("op", sorted(CLAUSES))
def test_the_sample_itself_is_accepted(op: str):
    for make in SAMPLES[op]:
        getattr(NATIVE, op)(**make())


def device_cases() -> Iterator[Any]:
    for op, makes in SAMPLES.items():
        for name, value in makes[0]().items():
            if torch.is_tensor(value) and op != "_fake_quant_backward":
                yield pytest.param(op, name, id=f"{op}-{name}")


@pytest.mark.parametrize(("op", "name"), list(device_cases()))
def test_tensors_of_two_devices_are_refused(op: str, name: str):
    arguments = SAMPLES[op][0]()
    if len(tensors_of(arguments)) == 1:
        return
    arguments[name] = arguments[name].to("meta")
    before = [t.clone() for t in tensors_of(arguments)]
    with pytest.raises(RuntimeError, match=rf"{PUBLIC.get(op, op)}: expected .+ to be .+, got"):
        getattr(NATIVE, op)(**arguments)
    for tensor, old in zip(tensors_of(arguments), before, strict=True):
        assert tensor.is_meta or tensor.equal(old)
