"""Trains the float net and writes examples/weights/<data set>.safetensors (ten minutes)."""

from __future__ import annotations

import argparse
import sys
import time

import torch
from safetensors.torch import save_file
from torch import nn

from common.data import DataError, Dataset, augment, digits, load
from common.net import WEIGHTS_FOLDER, SmallNet, accuracy


def train(data: Dataset, epochs: int, batch: int, peak_rate: float, seed: int) -> SmallNet:
    """AdamW under a one-cycle learning rate, on shifted (and mirrored) images."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = SmallNet()
    steps = -(-len(data.train_labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak_rate, epochs * steps)
    loss_of = nn.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in range(epochs):
        begun = time.perf_counter()
        model.train()
        total = 0.0
        for indices in torch.randperm(len(data.train_labels), generator=generator).split(batch):
            images = augment(data.train_images[indices], data.mirrored_is_same, generator)
            loss = loss_of(model(images), data.train_labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(indices)
        model.eval()
        right = accuracy(model, data.test_images, data.test_labels)
        print(
            f"epoch {epoch + 1:2} of {epochs}: loss {total / len(data.train_labels):.4f}, "
            f"test accuracy {right:.2f} %, {time.perf_counter() - begun:.0f} s",
            flush=True,
        )
    return model


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--digits", action="store_true", help="train on scikit-learn's digits")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    try:
        data = digits() if options.digits else load(options.data)
    except DataError as error:
        print(f"train_float: {error}", file=sys.stderr)
        return 2
    print(data.note)
    batch = 128 if data.name == "fashion_mnist" else 32
    model = train(data, options.epochs, batch, peak_rate=4e-3, seed=0)
    WEIGHTS_FOLDER.mkdir(exist_ok=True)
    path = WEIGHTS_FOLDER / f"{data.name}.safetensors"
    save_file(model.state_dict(), path)
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
