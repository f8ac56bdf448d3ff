"""Quantization-aware training of the example net, step by step the same for every start."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from common.data import Dataset, augment
from torch_ext import float_parameters, quantization_parameters


@dataclass(frozen=True)
class Plan:
    """How long and how hard to train."""

    steps: int
    batch: int = 64
    rate: float = 1e-3
    range_rate: float = 1e-4  # of learned scales and clipping levels
    seed: int = 0


def train_quantized(model: nn.Module, data: Dataset, plan: Plan) -> list[float]:
    """Trains a model that is in state QAT and returns the loss of each step.

    Batches, augmentation and dropout depend on the plan only: two models see the same.
    """
    torch.manual_seed(plan.seed)  # dropout
    generator = torch.Generator().manual_seed(plan.seed)
    model.train()
    # Adam's steps are of the size of the rate: too long for scales, which are small numbers.
    groups = [
        {"params": quantization_parameters(model), "lr": plan.range_rate, "weight_decay": 0.0},
        {"params": float_parameters(model)},
    ]
    optimizer = torch.optim.AdamW(groups, lr=plan.rate, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    loss_of = nn.CrossEntropyLoss()
    losses: list[float] = []
    for _ in range(plan.steps):
        indices = torch.randint(len(data.train_labels), (plan.batch,), generator=generator)
        images = augment(data.train_images[indices], data.mirrored_is_same, generator)
        loss = loss_of(model(images), data.train_labels[indices])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return losses
