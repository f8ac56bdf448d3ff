"""Calibration on several processes: each observes its share of the images, all get one result.

torchrun --nproc-per-node 2 examples/calibrate_distributed.py
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import torch_ext
from common.data import DataError, load
from common.net import accuracy, trained
from torch_ext import calibrate, prepare_qat, save_observer_params, set_fake_quantize

OUTPUT = Path(__file__).parent / "output"


def prepared(name: str, example: Tensor) -> nn.Module:
    """The trained net with quantizers; the same on every rank."""
    model = torch_ext.fuse(trained(name))
    model.qconfig = torch_ext.get_default_calib_qconfig()
    return prepare_qat(model, example_inputs=example)


def calibrated(name: str, batches: list[Tensor]) -> nn.Module:
    """Calibrated on the batches of all ranks, of which this one runs every world-size-th."""
    model = prepared(name, batches[0][:1])
    own = batches[dist.get_rank() :: dist.get_world_size()]
    if own:
        calibrate(model, own, state="calibration")
    else:  # more processes than batches
        set_fake_quantize(model, "calibration")
    torch_ext.sync_observers(model)
    set_fake_quantize(model, "validation")  # solves the same on every rank
    print(f"rank {dist.get_rank()}: {len(own)} of {len(batches)} batches", flush=True)
    return model


def differing(left: nn.Module, right: nn.Module) -> list[str]:
    """Names of the tensors that are not equal bit for bit."""
    others = right.state_dict()
    return [
        name
        for name, tensor in left.state_dict().items()
        if tensor.numpy().tobytes() != others[name].numpy().tobytes()
    ]


def run(arguments: argparse.Namespace) -> int:
    data = load(arguments.data)
    images, tested = (256, 500) if arguments.quick else (4096, 10_000)
    batches = list(data.train_images[:images].split(arguments.batch))
    if dist.get_rank() == 0:
        print(data.note, flush=True)
    model = calibrated(data.name, batches)
    if dist.get_rank() != 0:
        return 0

    path = arguments.output / "calibration.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_observer_params(model, path)
    found = accuracy(model, data.test_images[:tested], data.test_labels[:tested])
    print(f"rank 0: accuracy {found:.2f} %, saved {path}")

    alone = prepared(data.name, batches[0][:1])
    calibrate(alone, batches)
    if wrong := differing(model, alone):
        print(f"NOT what one process finds: {', '.join(wrong)}")
        return 1
    count = len(model.state_dict())
    print(f"rank 0: all {count} tensors are bit for bit what one process finds")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", metavar="DIR", help="folder with the idx files of Fashion-MNIST")
    parser.add_argument("--output", metavar="DIR", type=Path, default=OUTPUT)
    parser.add_argument("--batch", type=int, default=64, help="images of a batch")
    parser.add_argument("--quick", action="store_true", help="a small slice of everything")
    arguments = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        print(f"calibrate_distributed: start it as {__doc__.splitlines()[2]}", file=sys.stderr)
        return 2
    # Processes of one machine share its cores.
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ["LOCAL_WORLD_SIZE"])))
    dist.init_process_group("gloo")
    try:
        return run(arguments)
    except (DataError, OSError) as error:
        print(f"calibrate_distributed: {error}", file=sys.stderr)
        return 2
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
