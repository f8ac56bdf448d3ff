"""A few models of each group of the zoo; `make zoo` runs all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from grid_checks import off_grid
from nets.yolo_style import YoloStyle
from prepare_steps import ready, run_calibration
from zoo import checks, operators
from zoo.entry import Entry, image
from zoo.nets import plain_nets, timm_nets, torchvision_nets, transformers_nets

# Model -> calls of convolutions, linear layers and products in eval and in train mode.
CALLS = {
    "plain/nn_transformer": (29, 29),
    "plain/lstm_packed": (1, 1),
    "plain/gru_cell_loop": (5, 5),
    "torchvision/mobilenet_v2": (53, 53),
    "torchvision/lraspp_mobilenet_v3_large": (66, 66),
    "timm/tinynet_e": (52, 52),
    "timm/vit_tiny_patch16_224": (17, 17),
    "transformers/GPT2LMHeadModel": (11, 11),
    "transformers/T5ForConditionalGeneration": (39, 39),
    "transformers/MixtralForCausalLM": (17, 17),
    "transformers/WavLMModel": (22, 22),
    "yolo/style": (21, 20),
}
_GROUPS = {
    "plain": plain_nets,
    "torchvision": torchvision_nets,
    "timm": timm_nets,
    "transformers": transformers_nets,
}


def entry(name: str) -> Entry:
    group = name.partition("/")[0]
    if group == "yolo":
        return Entry(name, YoloStyle, image(32))
    operators.declare()
    if group != "plain":
        pytest.importorskip(group, reason=f"needs {group}: run `make test`")
    return next(one for one in _GROUPS[group].entries() if one.name == name)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", CALLS)
def test_a_model_of_the_zoo(name: str) -> None:
    kept: list[dict[str, Any]] = []
    checks.check(entry(name), ["prepare", "float", "coverage", "qat"], lambda r: kept.append(r))
    record = kept[-1]
    assert "failed" not in record
    assert record["prepared"] is True
    assert record["float_eval"] == record["float_train"] == "equal"
    assert record["off_eval"] == record["off_train"] == []
    assert (record["calls_eval"][1], record["calls_train"][1]) == CALLS[name]
    assert record["sqnr"] > 10
    assert record["qat"] == "ok"


def test_a_head_that_keeps_anchors_takes_images_of_other_sizes() -> None:
    model = YoloStyle().eval()
    model(torch.randn(1, 3, 32, 32))
    net = ready(model, example_inputs=torch.randn(2, 3, 32, 32))
    run_calibration(net, torch.randn(2, 3, 32, 32))
    for size in (48, 32, 64):
        found, seen = off_grid(net, torch.randn(2, 3, size, size))
        assert not found
        assert seen == {"conv2d": 21}
