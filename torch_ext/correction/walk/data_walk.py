"""Runs data through a prepared model, and stops at each of some modules in order of execution."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch

from torch_ext.calibration.restore import one_call_at_a_time, restored
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import PreparedModel
from torch_ext.quantizers.set_state import change_states
from torch_ext.quantizers.state_table import FakeQuantState
from torch_ext.utils.arguments import check_callable
from torch_ext.utils.batches import (
    Forward,
    check_batches,
    default_forward,
    digest,
    model_device,
    to_device,
)
from torch_ext.utils.modes import eval_mode, forked_rng, uncompiled
from torch_ext.utils.text import shown


class WatchedCall(Protocol):
    """One call of a module, before it computes."""

    @property
    def name(self) -> str:
        """The module's name."""

    @property
    def output(self) -> Any:
        """What it computes as it was called."""

    def again(self) -> Any:
        """What it computes as it is by now."""


C = TypeVar("C", bound=WatchedCall)


class DataWalk(Generic[C]):
    """Runs of the data that come by some modules of a prepared model.

    Everything happens within :meth:`guarded`. The first :meth:`run` finds the order::

        with walk.guarded():
            walk.enter(FakeQuantState.FLOAT)
            walk.run(visit)                  # every call of every module, in the float model
            walk.enter(FakeQuantState.VALIDATION)
            for name in walk.sequentially(walk.order, visit, finish):
                ...                          # each read what the changed ones before it made

    Subclasses say how calls are noticed: :meth:`watched`.

    Attributes:
        names: of all that may be walked.
        order: the names of those that the data comes by, in the order of their first call.
        left: the name of each other module that was asked for, and why it is not walked.
        digests: of the batches of the first run.
    """

    def __init__(
        self,
        prepared: PreparedModel,
        data: Any,
        names: Sequence[str],
        left: Mapping[str, str],
        forward: Forward | None,
        device: torch.device | str | None,
    ) -> None:
        """Raises TypeError or ValueError for arguments of a wrong kind.

        Args:
            prepared: of the public function that errors name.
            data: batches that can be run over again.
            names, left: see above.
            forward, device: as in ``calibrate``.
        """
        who = self.who = prepared.who
        check_batches(who, "data", data)
        if isinstance(data, Iterator):
            raise TypeError(
                f"{who}: expected data to be batches that can be run over again, such as a list, "
                f"got {type(data).__name__}"
            )
        check_callable(who, "forward", forward)
        self.prepared = prepared
        self.names = list(names)
        self.left = dict(left)
        self.order: list[str] = []
        self.digests: list[str] = []
        self.batch = 0  # which of the batches runs now
        self._data = data
        self._forward = forward or default_forward(who)
        self._device = model_device(who, prepared.root, device)
        self._calls: list[dict[str, int]] = []  # of each batch: how often it calls each module
        self._active: list[FakeQuantize] = []

    def leave(self, name: str, why: str) -> None:
        """Takes a module out of the walk, before the first run."""
        self.names.remove(name)
        self.left[name] = why

    def watched(self, at_call: Callable[[C], Any]) -> contextlib.AbstractContextManager[None]:
        """Calls ``at_call`` for every call of ``names``, and lets it compute what that returns."""
        raise NotImplementedError

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Eval mode, no gradients; at the end modes, random state and quantizers are restored.

        Quantizers are in VALIDATION in it at first. Raises RuntimeError, by name, for quantizers
        without a range.
        """
        prepared, root = self.prepared, self.prepared.root
        with contextlib.ExitStack() as stack:
            stack.enter_context(one_call_at_a_time(self.who, root))
            stack.enter_context(restored(prepared.quantizers))
            stack.enter_context(eval_mode(root))
            stack.enter_context(forked_rng(root))
            stack.enter_context(torch.no_grad())
            stack.enter_context(uncompiled())
            change_states(self.who, root, FakeQuantState.VALIDATION)
            # One that saw no data, and need not, passes values through.
            self._active = [q for q in prepared.quantizers.values() if not q.passes_through]
            yield

    def enter(self, state: FakeQuantState) -> None:
        """Sets the state of all quantizers."""
        for quantizer in self._active:
            quantizer.enter(state)

    def run(
        self,
        visit: Callable[[C], None] | None = None,
        output: Callable[[Any], None] | None = None,
    ) -> None:
        """Runs all data; calls ``visit`` for each call, ``output`` for what the model returns.

        Raises:
            ValueError: the data is empty, differs from that of the first run, or comes by none of
                the modules.
        """
        first = not self._calls
        counts: list[dict[str, int]] = []

        def at_call(call: C) -> Any:
            calls = counts[self.batch]
            calls[call.name] = calls.get(call.name, 0) + 1
            if first and call.name not in self.order:
                self.order.append(call.name)
            if visit is not None:
                visit(call)
            return call.output

        with self.watched(at_call):
            for batch in self._batches(first):
                counts.append({})
                made = self._forward(self.prepared.root, batch)
                if output is not None:
                    output(made)
        if first:
            self._calls = counts
            self._check_order()

    def collect(self, name: str, visit: Callable[[C], None]) -> None:
        """Runs each batch as far as the last call of one module; visits each of its calls.

        Raises RuntimeError, by name, if there is none.
        """
        seen, visited = 0, False

        def at_call(call: C) -> Any:
            nonlocal seen, visited
            if call.name == name:
                seen, visited = seen + 1, True
                visit(call)
                if seen == self._calls[self.batch].get(name, 0):
                    raise _Enough
            return call.output

        with self.watched(at_call):
            for batch in self._batches():
                seen = 0
                self._run_until_enough(batch)
        if not visited:
            raise not_called(self.who, name)

    def sequentially(
        self, names: Sequence[str], visit: Callable[[C], None], finish: Callable[[str], None]
    ) -> Iterator[str]:
        """For one module after the other: visits each of its calls, then calls ``finish``.

        What ``finish`` changes of the module is there for all that follows. Each module costs a run
        of the data as far as the module. A single batch is run once for all: its forward goes on
        with what the finished module computes, unless that is called several times.

        Gives the name of each module that is finished.
        """
        wanted = set(names)
        left = [name for name in self.order if name in wanted]
        while left:
            if len(self._calls) == 1 and self._calls[0][left[0]] == 1:
                done = self._in_one_run(left, visit, finish)
            else:
                done = left[:1]
                self.collect(left[0], visit)
                finish(left[0])
            left = left[len(done) :]
            yield from done

    def _in_one_run(
        self, names: list[str], visit: Callable[[C], None], finish: Callable[[str], None]
    ) -> list[str]:
        """Walks the first of ``names`` in one forward, up to one that is called several times."""
        several = (i for i, name in enumerate(names) if self._calls[0][name] > 1)
        left = names[: next(several, len(names))]
        done: list[str] = []

        def at_call(call: C) -> Any:
            if call.name != left[len(done)]:
                return call.output
            visit(call)
            finish(call.name)
            done.append(call.name)
            if len(done) == len(left):
                raise _Enough
            return call.again()

        with self.watched(at_call):
            for batch in self._batches():
                self._run_until_enough(batch)
        if not done:
            raise not_called(self.who, left[0])
        return done

    def _run_until_enough(self, batch: Any) -> None:
        with contextlib.suppress(_Enough):
            self._forward(self.prepared.root, batch)

    def _batches(self, first: bool = False) -> Iterator[Any]:
        count = 0
        for batch in self._data:
            found = digest(batch)
            if first:
                self.digests.append(found)
            elif self.digests[count : count + 1] != [found]:
                raise ValueError(
                    f"{self.who}: expected data to give the same batches each time it is run over, "
                    f"got another batch {count + 1}; pass a list, or a DataLoader without "
                    "shuffling and random changes"
                )
            self.batch = count
            count += 1
            yield to_device(batch, self._device)
        if count == 0 or count < len(self.digests):
            have = "none" if count == 0 else f"{count}, of {len(self.digests)} the first time"
            raise ValueError(f"{self.who}: expected data to give batches, got {have}")

    def _check_order(self) -> None:
        missed = [name for name in self.names if name not in self.order]
        self.left |= dict.fromkeys(missed, "the data does not come by it")
        if not self.order:
            raise ValueError(
                f"{self.who}: expected data to come by one of {shown(self.names)}, got none"
            )


def not_called(who: str, name: str) -> RuntimeError:
    """The error where a forward decides by values, and quantization changed what it decides."""
    return RuntimeError(
        f'{who}: expected the quantized model to call "{name}" as the float model does, got a '
        "forward without it; leave it out by pattern"
    )


class _Enough(BaseException):  # no error: handlers of errors in the forward let it pass
    """Ends a forward of which the rest is not needed."""
