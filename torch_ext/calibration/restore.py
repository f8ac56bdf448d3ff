"""Context managers that guard a model in a call: restore its quantizers, keep others out, warn."""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping

from torch import nn

from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import named_quantizers
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.text import shown

_BUSY: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # the models in a call
_BUSY_LOCK = threading.Lock()


@contextlib.contextmanager
def restored_on_error(quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Restores the quantizers' buffers, grids, rules and states if the body raises."""
    restore = _snapshot(quantizers)
    try:
        yield
    except BaseException:
        restore()
        raise


@contextlib.contextmanager
def restored(quantizers: Mapping[str, FakeQuantize]) -> Iterator[None]:
    """Restores the quantizers' buffers, grids, rules and states when the body ends or raises."""
    restore = _snapshot(quantizers)
    try:
        yield
    finally:
        restore()


def _snapshot(quantizers: Mapping[str, FakeQuantize]) -> Callable[[], None]:
    """Copies the quantizers' buffers, grids, rules and states; the result restores them."""
    states = {
        name: (quantizer.state, quantizer.passes_through, quantizer.observer.synced)
        for name, quantizer in quantizers.items()
    }
    settings = {name: quantizer.observer.kept_settings() for name, quantizer in quantizers.items()}
    tensors = {
        name: {key: value.clone() for key, value in quantizer.state_dict().items()}
        for name, quantizer in quantizers.items()
    }

    def restore() -> None:
        for name, quantizer in quantizers.items():
            state, passes_through, synced = states[name]
            quantizer.enter(FakeQuantState.FLOAT)
            settings[name]()
            quantizer.load_state_dict(tensors[name])
            quantizer.observer.synced = synced
            quantizer.enter(state, pass_through=passes_through)

    return restore


@contextlib.contextmanager
def one_call_at_a_time(who: str, root: nn.Module) -> Iterator[None]:
    """Raises RuntimeError if such a call of the unwrapped model goes on, in any thread."""
    with _BUSY_LOCK:
        if root in _BUSY:
            raise RuntimeError(
                f"{who}: expected one call at a time for a model, got another that still runs, "
                "which resets statistics and sets states too; to calibrate from several threads, "
                'call set_fake_quantize(model, "calibration"), run the forwards in the threads, '
                'and call set_fake_quantize(model, "validation") when they have ended'
            )
        _BUSY.add(root)
    try:
        yield
    finally:
        with _BUSY_LOCK:
            _BUSY.discard(root)


@contextlib.contextmanager
def watched(who: str, model: nn.Module) -> Iterator[None]:
    """Warns if a parameter or buffer was written to in the body; quantizers' buffers may be."""
    quantizer_buffers = {
        id(tensor)
        for quantizer in named_quantizers(model).values()
        for tensor in quantizer.buffers()
    }
    tensors = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in quantizer_buffers and not tensor.is_inference()
    }
    versions = {name: tensor._version for name, tensor in tensors.items()}
    yield
    changed = [name for name, tensor in tensors.items() if tensor._version != versions[name]]
    if changed:
        warnings.warn(
            f"{who}: the model's forward changed {shown(changed)} although in eval mode",
            stacklevel=4,
        )
