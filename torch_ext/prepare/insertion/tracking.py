"""Which modules of a model are tracked, because their calls are part of the plan."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize

from torch_ext.prepare.insertion.plan import Plan
from torch_ext.prepare.insertion.recording import Recording, is_torchs_leaf


def tracked_modules(model: nn.Module, recordings: list[Recording], plan: Plan) -> list[str]:
    """Their names, the model's own first.

    Torch's modules that read nothing quantized and call no function of the table do without; so
    does what is inside of a module that is left float as a whole.
    """
    busy = set().union(*(recording.busy for recording in recordings))
    whole = {call.module for recording in recordings for call in recording.all_calls if call.free}
    found = []
    for name, module in model.named_modules():
        inside_whole = any(name.startswith(f"{other}.") for other in whole)
        plain = is_torchs_leaf(module) and not (name in busy or name in plan.layers)
        computes_weight = isinstance(module, parametrize.ParametrizationList)
        if not (inside_whole or plain or computes_weight or "forward" in vars(module)):
            found.append(name)
    return found
