"""A program that makes a CUDA device fault, and tells what every op does then.

Prints one line per step: a name, and the text of the exception or nothing. After an asynchronous
fault a process has no use of the device any more, so this is a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import torch

from op_samples import SAMPLES

NATIVE = torch.ops.torch_ext
Call = Callable[[], object]


def report(name: str, call: Call) -> None:
    try:
        call()
    except Exception as error:
        print(f"{name}: {' '.join(str(error).split())}")
    else:
        print(f"{name}:")


def moved(arguments: dict[str, object]) -> dict[str, object]:
    def to_device(value: object) -> object:
        if isinstance(value, list):
            return [to_device(one) for one in value]
        return value.cuda() if isinstance(value, torch.Tensor) else value

    return {key: to_device(value) for key, value in arguments.items()}


def wild_tensor() -> torch.Tensor:
    """A tensor whose memory is not there: what a freed or foreign pointer looks like."""
    device = torch.device("cuda", torch.cuda.current_device())
    storage = torch._C._construct_storage_from_data_pointer(1 << 44, device, 4096)
    return torch.empty(0, device=device).set_(storage, 0, (1024,), (1,))


def fault_of_torch() -> None:
    """An index out of range trips an assertion inside a kernel of Torch's."""
    index = torch.tensor([1 << 20], device="cuda")
    torch.zeros(3, device="cuda").index_select(0, index)


def fault_of_ours() -> None:
    arguments = moved(SAMPLES["observe_"][1]())
    NATIVE.observe_(**arguments | {"x": wild_tensor()})


def main() -> None:
    calls = {op: moved(makes[0]()) for op, makes in SAMPLES.items()}
    for op, arguments in calls.items():
        report(f"before {op}", lambda op=op, given=arguments: getattr(NATIVE, op)(**given))
    report("sound", torch.cuda.synchronize)
    faults: dict[str, Call] = {"torch": fault_of_torch, "ours": fault_of_ours}
    report("enqueue", faults[sys.argv[1]])
    report("wait", torch.cuda.synchronize)
    for op, arguments in calls.items():
        report(f"after {op}", lambda op=op, given=arguments: getattr(NATIVE, op)(**given))
    report("wait again", torch.cuda.synchronize)


if __name__ == "__main__":
    main()
