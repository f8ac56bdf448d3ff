"""The processes of a group: where their tensors meet, and whether they are about the same thing."""

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

Facts = Mapping[str, Mapping[str, Any]]


class Ranks:
    """A process group as one call uses it; raises where there is none."""

    def __init__(self, who: str, group: dist.ProcessGroup | None) -> None:
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

    def meeting_place(self, device: torch.device) -> torch.device:
        """The device itself where the group's backends serve it, else one that they serve."""
        if device.type in self.device_types:
            return device
        if "cpu" in self.device_types:
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def reduce_(self, tensor: Tensor, op: dist.ReduceOp.RedOpType) -> Tensor:
        """Combines the tensors of all ranks, in place, on every rank."""
        try:
            dist.all_reduce(tensor, op, self.group)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.who}: expected every rank to take part, got an error or a timeout; nothing "
                f"was changed here: {error}"
            ) from error
        return tensor

    def agree(self, facts: Facts, problem: Exception | None, near: torch.device) -> None:
        """Raises on every rank where one has a problem, or where their facts differ.

        `facts`: per quantizer, plain values; `near`: the model's device. One collective of three
        numbers compares a digest; only where that differs the facts themselves travel, to name the
        difference.
        """
        place = self.meeting_place(near if "cpu" not in self.device_types else torch.device("cpu"))
        text = json.dumps(facts, sort_keys=True)
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        mine = [digest, ~digest, int(problem is not None)]
        found = torch.tensor(mine, device=place)
        most, least, trouble = self.reduce_(found, dist.ReduceOp.MAX).tolist()
        if most == ~least and not trouble:
            return
        told: list[Any] = [None] * dist.get_world_size(self.group)
        on_place = torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext()
        with on_place:  # which is where objects travel with NCCL
            dist.all_gather_object(told, (facts, problem and str(problem)), self.group)
        if problem is not None:
            raise problem
        for rank, (_, complaint) in enumerate(told):
            if complaint is not None:
                raise RuntimeError(f"{self.who}: refused on rank {rank}: {complaint}")
        for rank, (theirs, _) in enumerate(told):
            if text := _difference(told[0][0], theirs, rank):
                raise ValueError(
                    f"{self.who}: expected all ranks to have the same quantizers, got {text}"
                )


def _difference(first: Facts, other: Facts, rank: int) -> str:
    """What rank 0 and another differ in; nothing where they are equal."""
    for mine, theirs, who in ((first, other, "0"), (other, first, str(rank))):
        if only := [name for name in mine if name not in theirs]:
            return f"{shown(only)} on rank {who} alone"
    for name, mine in first.items():
        for key, value in mine.items():
            have = other[name].get(key)
            if have != value:
                return f"{shown([name])}.{key}: {value!r} on rank 0, {have!r} on rank {rank}"
    return ""
