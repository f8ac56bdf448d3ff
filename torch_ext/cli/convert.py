"""``torch-ext convert``: writes a file for an inference engine."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping

from torch_ext import export
from torch_ext.cli.arguments import Commands, add_command, add_file
from torch_ext.cli.terminal import print_summary
from torch_ext.export.tensorrt.cache import ALGORITHMS
from torch_ext.files.saved_quantizers import read_quantizers
from torch_ext.files.storage import read_object
from torch_ext.quantizers.set_state import set_fake_quantize
from torch_ext.utils.text import joined

# For each format the function that writes it, and the options that this function takes.
_FORMATS: Mapping[str, tuple[Callable[..., export.ExportReport], tuple[str, ...]]] = {
    "json": (export.json, ()),
    "ncnn": (export.ncnn_table_of, ("layers",)),
    "tensorrt-cache": (export.tensorrt_cache, ("version", "algorithm", "names")),
}
_OPTIONS = tuple(dict.fromkeys(key for _, options in _FORMATS.values() for key in options))


def register(commands: Commands) -> None:
    parser = add_command(
        commands,
        "convert",
        run,
        "writes a file for an inference engine",
        "convert net.safetensors --to tensorrt-cache --version 8.6.1 -o net.cache",
    )
    add_file(parser)
    parser.add_argument("--to", required=True, choices=_FORMATS)
    parser.add_argument("-o", "--output", required=True, metavar="FILE")
    parser.add_argument(
        "--without",
        action="append",
        metavar="NAMES",
        help="leave out the quantizers with these names; may be repeated",
    )
    group = parser.add_argument_group("for tensorrt-cache")
    group.add_argument(
        "--version", help="version of the TensorRT that will read the cache, such as 8.6.1"
    )
    group.add_argument("--algorithm", choices=ALGORITHMS)
    group.add_argument(
        "--names",
        metavar="FILE",
        help="JSON: for each quantizer the network's tensor, or a list of tensors",
    )
    parser.add_argument_group("for ncnn").add_argument(
        "--layers",
        metavar="FILE",
        help='JSON: for each layer of the network {"weight": QUANTIZER, "input": QUANTIZER}, with '
        '"groups" for a grouped convolution, and "channels" for a weight with a single scale',
    )


def run(arguments: argparse.Namespace) -> int:
    write, options = _FORMATS[arguments.to]
    given = {
        key: getattr(arguments, key) for key in _OPTIONS if getattr(arguments, key) is not None
    }
    if unknown := [f"--{key}" for key in given if key not in options]:
        known = joined(f"--{key}" for key in options)
        raise ValueError(f"unknown option {', '.join(unknown)} of {arguments.to}; known: {known}")
    for key in {"names", "layers"} & given.keys():
        given[key] = read_object(given[key])
    if arguments.to == "ncnn" and "layers" not in given:
        raise ValueError(
            "expected --layers, as a file does not say which quantizers each layer has"
        )
    model = read_quantizers(arguments.file)
    if arguments.without:
        set_fake_quantize(model, "float", pattern=arguments.without)
    print_summary(write(model, path=arguments.output, **given), arguments.json)
    return 0
