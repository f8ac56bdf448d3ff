"""Nothing in a forward or backward makes the host wait for a device: seen without one."""

from __future__ import annotations

import pytest
import torch

from host_reads import HostReads
from nets.exact_net import RULES, batch, ready_for, step, upstream
from torch_ext import FakeQuantState


@pytest.mark.parametrize("state", list(FakeQuantState), ids=lambda s: s.value)
@pytest.mark.parametrize("rule", RULES)
def test_a_step_reads_no_value(rule: str, state: FakeQuantState):
    model = ready_for(state, rule, "cpu")
    x, given = batch(0), upstream(0)
    with HostReads():
        step(model, x, given, train=state is FakeQuantState.QAT)


def test_reads_are_seen():
    x = torch.ones(3)
    with HostReads():
        for read in (
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x.nonzero(),
            lambda: x.tolist(),
            lambda: torch.equal(x, x + 1),
            lambda: x.to("meta"),
        ):
            with pytest.raises(RuntimeError, match=r"on the host|between devices"):
                read()
        assert (x + 1).shape == (3,)
