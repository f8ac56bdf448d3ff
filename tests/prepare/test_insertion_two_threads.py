"""Prepared models that call compiled functions, in several threads."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch import Tensor, nn

from torch_ext import get_default_qconfig, prepare_qat, set_fake_quantize

X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(1))


@torch.compile(backend="eager")
def scaled(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class CallsCompiled(nn.Module):
    """Its forward waits in the middle for the other thread's to begin, or to end."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.begun = self.ended = None

    def forward(self, x: Tensor) -> Tensor:
        x = scaled(self.fc(x))
        name = threading.current_thread().name
        if name == "second":
            both.wait()
            first_done.wait()
        elif name == "first":
            both.wait()
        return x


both, first_done = threading.Barrier(2), threading.Event()


def test_compiling_goes_on_after_overlapping_forwards() -> None:
    plain = CallsCompiled().eval()
    plain.qconfig = get_default_qconfig()  # type: ignore[assignment]
    net = prepare_qat(plain, example_inputs=X)
    set_fake_quantize(net, "calibration")

    def run() -> None:
        net(X)
        if threading.current_thread().name == "first":
            first_done.set()

    threads = [threading.Thread(target=run, name=name) for name in ("first", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    graphs: list[torch.fx.GraphModule] = []

    def count(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    torch.compile(lambda x: x + 1, backend=count)(X)
    assert len(graphs) == 1
