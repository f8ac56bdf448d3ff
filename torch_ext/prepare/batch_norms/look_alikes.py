"""Modules that compute a batch norm without being one, such as torchvision's FrozenBatchNorm2d."""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase

from torch_ext.prepare.insertion.recording import Recording
from torch_ext.prepare.module_classes import copied


def look_alikes(model: nn.Module) -> list[str]:
    """Names of modules of other classes that have the statistics of a batch norm."""
    return [name for name, module in model.named_modules() if _has_statistics(module)]


def _has_statistics(module: nn.Module) -> bool:
    if isinstance(module, _NormBase):  # torch's own; instance norms have statistics too
        return False
    mean, variance = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    return isinstance(mean, Tensor) and isinstance(variance, Tensor)


def whole_call(recording: Recording, name: str) -> tuple[fx.Node, set[fx.Node]] | str:
    """What a module's only call reads, and its nodes; or why it is no batch norm in eval mode."""
    calls = [call for call in recording.all_calls if call.module == name]
    if len(calls) != 1:
        return f"it is called {len(calls)} times with the example in eval mode"
    inside = [
        node
        for node in recording.graph.nodes
        if node.op != "get_attr" and f"{recording.owners[node]}.".startswith(f"{name}.")
    ]
    given = {
        source
        for node in inside
        for source in node.all_input_nodes
        if source not in inside and source.op != "get_attr"
    }
    leaving = [node for node in inside if not set(node.users) <= set(inside)]
    if not inside or len(given) != 1 or any(node is not inside[-1] for node in leaving):
        return "its forward is not of one tensor"
    operand = given.pop()
    module = recording.model.get_submodule(name)
    if not _is_batch_norm(module, recording.values[operand]):
        return f"its forward ({type(module).__name__}) computes something else in eval mode"
    return operand, set(inside)


@torch.no_grad()
def _is_batch_norm(module: nn.Module, like: Tensor) -> bool:
    """Whether it computes in float64 what ``F.batch_norm`` does, for random values."""
    twin = copied("fuse", module)
    for part in twin.modules():
        if hasattr(vars(part).get("forward"), "__wrapped__"):
            del part.__dict__["forward"]  # the recording's
    twin = twin.double().eval()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)
    statistics = (twin.running_mean, twin.running_var)
    gains = (getattr(twin, "weight", None), getattr(twin, "bias", None))
    eps = getattr(twin, "eps", None)
    try:
        have = twin(x.clone())
        want = F.batch_norm(x, *statistics, *gains, False, 0.0, eps)  # type: ignore[arg-type]
    except Exception:  # the user's forward, or attributes that mean something else
        return False
    return isinstance(have, Tensor) and have.shape == want.shape and torch.allclose(have, want)
