"""What runs a model for its own purposes has to leave it as it was."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import named_quantizers
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.text import shown


@contextlib.contextmanager
def restored_on_error(quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Puts buffers, rules and states back when what runs inside fails."""
    put_back = _keep(quantizers)
    try:
        yield
    except BaseException:
        put_back()
        raise


@contextlib.contextmanager
def restored(quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Puts buffers, rules and states back at the end, however it ends."""
    put_back = _keep(quantizers)
    try:
        yield
    finally:
        put_back()


def _keep(quantizers: Mapping[str, FakeQuantize]) -> Callable[[], None]:
    states = {
        name: (q.state, q.passes_through, q.observer.synced) for name, q in quantizers.items()
    }
    rules = {name: (q.observer.name, q.observer.options) for name, q in quantizers.items()}
    kept = {
        name: {key: value.clone() for key, value in q.state_dict().items()}
        for name, q in quantizers.items()
    }

    def put_back() -> None:
        for name, quantizer in quantizers.items():
            state, passing, synced = states[name]
            rule, options = rules[name]
            quantizer.enter(FakeQuantState.FLOAT)
            quantizer.observer.set_rule(rule, **options)
            quantizer.load_state_dict(kept[name])
            quantizer.observer.synced = synced
            quantizer.enter(state, pass_through=passing)

    return put_back


@contextlib.contextmanager
def watched(who: str, model: nn.Module) -> Iterator[None]:
    """Warns when the forward itself wrote to the model's parameters or buffers."""
    skip = {
        id(tensor)
        for quantizer in named_quantizers(model).values()
        for tensor in quantizer.buffers()
    }
    tensors = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in skip and not tensor.is_inference()
    }
    versions = {name: tensor._version for name, tensor in tensors.items()}
    yield
    changed = [name for name, tensor in tensors.items() if tensor._version != versions[name]]
    if changed:
        warnings.warn(
            f"{who}: the model's forward changed {shown(changed)} although in eval mode",
            stacklevel=4,
        )
