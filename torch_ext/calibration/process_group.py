"""A process group: the device its collectives run on, and a check that its ranks agree."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from torch_ext.utils.arguments import bounded
from torch_ext.utils.text import shown

# By quantizer: values that JSON can hold, by what they describe.
Facts = Mapping[str, Mapping[str, Any]]


class Ranks:
    """The ranks of a process group, for the function ``who`` that errors name."""

    def __init__(self, who: str, group: dist.ProcessGroup | None) -> None:
        """Checks the group; None is the default group.

        Raises:
            RuntimeError: torch.distributed is not initialised.
            TypeError: ``group`` is no process group.
            ValueError: this process is not in the group.
        """
        self.who = who
        self.group = group
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{who}: expected a process group, got none; start the processes with torchrun and "
                "call torch.distributed.init_process_group in each"
            )
        outside: object = dist.GroupMember.NON_GROUP_MEMBER
        if group is outside:
            raise ValueError(f"{who}: expected group to have this process as a member, got another")
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"{who}: expected group to be a ProcessGroup or None, got {bounded(group)}"
            )
        config = str(dist.get_backend_config(group))  # such as "cpu:gloo,cuda:nccl"
        self.device_types = [part.split(":")[0] for part in config.split(",")]

    def collective_device(self, device: torch.device) -> torch.device:
        """``device`` if a backend of the group supports it, otherwise one that is supported."""
        if device.type in self.device_types:
            return device
        if "cpu" in self.device_types:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """All-reduces a tensor in place; returns it. Raises RuntimeError if a rank is missing."""
        try:
            dist.all_reduce(tensor, op, self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.who}: expected every rank to take part, got an error or a timeout; nothing "
                f"was changed here: {error}"
            ) from error
        return tensor

    def agree(self, facts: Facts, problem: Exception | None, model_device: torch.device) -> None:
        """Raises on every rank if any rank has a problem, or if their facts differ.

        One collective of three integers compares a hash of the facts. Only if the hashes differ
        are the facts themselves gathered, to name the difference.

        Args:
            facts: what has to be equal on all ranks.
            problem: what this rank raises, if anything.
            model_device: a device of the model, for groups that have no backend for the CPU.

        Raises:
            Exception: ``problem``, on the ranks that have one.
            RuntimeError: on the others, if some rank has a problem, or if a rank is missing.
            ValueError: if the facts differ.
        """
        cpu = torch.device("cpu")
        device = self.collective_device(cpu if "cpu" in self.device_types else model_device)
        text = json.dumps(facts, sort_keys=True)
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        numbers = torch.tensor([digest, ~digest, int(problem is not None)], device=device)
        # The MAX of the complements is the complement of the smallest digest.
        largest, complement, any_problem = self.reduce_(numbers, dist.ReduceOp.MAX).tolist()
        if largest == ~complement and not any_problem:
            return
        gathered: list[Any] = [None] * dist.get_world_size(self.group)
        # NCCL sends objects by the current CUDA device.
        context = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with context:
            dist.all_gather_object(gathered, (facts, problem and str(problem)), self.group)
        if problem is not None:
            raise problem
        for rank, (_, message) in enumerate(gathered):
            if message is not None:
                raise RuntimeError(f"{self.who}: rank {rank} raised: {message}")
        for rank, (theirs, _) in enumerate(gathered):
            if text := _difference(gathered[0][0], theirs, rank):
                raise ValueError(
                    f"{self.who}: expected all ranks to have the same quantizers, got {text}"
                )


def _difference(first: Facts, other: Facts, rank: int) -> str:
    """The first difference between rank 0 and another, in words; empty if there is none."""
    for mine, theirs, who in ((first, other, "0"), (other, first, str(rank))):
        if only := [name for name in mine if name not in theirs]:
            return f"{shown(only)} on rank {who} alone"
    for name, mine in first.items():
        for key, value in mine.items():
            have = other[name].get(key)
            if have != value:
                return f"{shown([name])}.{key}: {value!r} on rank 0, {have!r} on rank {rank}"
    return ""
