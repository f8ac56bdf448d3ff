"""ONNX files in which every node has a name of its own, by which engines' layers are found."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def named_file(packages: Any, proto: Any, path: Path) -> Iterator[Path]:
    """The file of a ModelProto, or a copy for the time of the context.

    ONNX lets the names of nodes be empty and repeated. Where they are, nodes are named after their
    results, in `proto` itself and in the copy. `packages` is the package onnx, `proto` holds its
    weights.
    """
    if not _name_nodes(proto):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "net.onnx"
        packages.save(proto, str(copy), save_as_external_data=True, location="net.bin")
        # That moved the tensors to the other file.
        packages.external_data_helper.load_external_data_for_model(proto, folder)
        yield copy


def _name_nodes(proto: Any) -> bool:
    """Gives every node a name that no other has, in place; whether that changed anything."""
    nodes = list(all_nodes(proto.graph))
    count: dict[str, int] = {}
    for node in nodes:
        count[node.name] = count.get(node.name, 0) + 1
    changed = False
    for node in nodes:
        if node.name and count[node.name] == 1:
            continue
        base = name = next((output for output in node.output if output), node.op_type)
        number = 1
        while name in count:  # two branches may have results of one name
            number += 1
            name = f"{base}_{number}"
        count[name] = 1
        node.name = name
        changed = True
    return changed


def all_nodes(graph: Any) -> Iterator[Any]:
    """The nodes of a graph, and those of the bodies of its loops and branches."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for body in (attribute.g, *attribute.graphs):
                yield from all_nodes(body)
