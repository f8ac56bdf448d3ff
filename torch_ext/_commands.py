"""The subcommands of ``python -m torch_ext``: each takes its arguments and gives an exit code."""

from __future__ import annotations

import argparse
import glob
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch_ext
from torch_ext import _C, export
from torch_ext._terminal import print_json, print_table
from torch_ext.analysis.report.report import report
from torch_ext.calibration.resolve import resolve
from torch_ext.files.compare import Comparison, Difference, compare
from torch_ext.files.merge import merge_observer_params
from torch_ext.files.observer_params import read_observer_params, save_observer_params
from torch_ext.files.quantizer_params import Params, params_of
from torch_ext.files.saved_quantizers import SavedQuantizers, read_quantizers
from torch_ext.files.storage import read_object
from torch_ext.prepare.describe import describe
from torch_ext.quantizers.fake_quantize import FakeQuantize
from torch_ext.quantizers.find import named_quantizers, role_of, select
from torch_ext.quantizers.set_state import set_fake_quantize
from torch_ext.quantizers.solve import findings

OPTION = "option_"  # before the names of rules' options, among the arguments
# What writes a format, and the options that it takes.
FORMATS: Mapping[str, tuple[Callable[..., export.ExportReport], tuple[str, ...]]] = {
    "json": (export.json, ()),
    "ncnn": (export.ncnn_table_of, ("layers",)),
    "tensorrt-cache": (export.tensorrt_cache, ("version", "algorithm", "names")),
}
_CONVERT_OPTIONS = tuple(dict.fromkeys(key for _, own in FORMATS.values() for key in own))
_SUFFIXES = ("", ".safetensors")
_PAGES = (".html", ".htm")
_ROOT = "(the model itself)"


def info(arguments: argparse.Namespace) -> int:
    """Version, build, rules and methods."""
    rules = {name: _C.observer_info(name) for name in torch_ext.observers()}
    methods = {name: _C.fake_quant_info(name) for name in torch_ext.fake_quants()}
    build = torch_ext.build_info()
    if arguments.json:
        print_json({**build, "observers": rules, "fake_quants": methods})
        return 0
    for key, value in build.items():
        print(f"{key}: {value}")
    print(f"fake-quants: {', '.join(methods)}\n")
    rows = []
    for name, rule in rules.items():
        options = ", ".join(f"{row['name']} {row['default']}" for row in rule["options"])
        rows.append([name, rule["statistic"], str(rule["max_bits"]), options])
    print_table(("observer", "reads", "bits", "options"), rows)
    return 0


def show(arguments: argparse.Namespace) -> int:
    """The quantizers of a file."""
    model = read_quantizers(arguments.file)
    _show(arguments, model, select("show", named_quantizers(model), arguments.pattern))
    return 0


def solve(arguments: argparse.Namespace) -> int:
    """Solves the statistics of a file again."""
    _check_output(arguments.output)
    model = read_quantizers(arguments.file)
    chosen = select("solve", named_quantizers(model), arguments.pattern)
    seeing = [name for name, quantizer in chosen.items() if not quantizer.transient]
    if not seeing:
        raise ValueError(
            "solve: expected quantizers of activations, got weights alone, which a file does not "
            "hold: take resolve(model, weight_observer=...)"
        )
    options = {
        name.removeprefix(OPTION): value
        for name, value in vars(arguments).items()
        if name.startswith(OPTION) and value is not None
    }
    resolve(model, arguments.observer, pattern=list(map(glob.escape, seeing)), **options)
    if arguments.output is not None:
        save_observer_params(model, arguments.output)
    _show(arguments, model, {name: chosen[name] for name in seeing})
    return 0


def merge(arguments: argparse.Namespace) -> int:
    """Joins the files of several machines."""
    _check_output(arguments.output)
    done = merge_observer_params(arguments.files, arguments.output, _progress(arguments))
    if arguments.json:
        print_json(asdict(done))
    else:
        print(done)
    return 0


def convert(arguments: argparse.Namespace) -> int:
    """Writes a file for an engine."""
    write, own = FORMATS[arguments.to]
    given = {
        key: getattr(arguments, key)
        for key in _CONVERT_OPTIONS
        if getattr(arguments, key) is not None
    }
    if strange := [f"--{key}" for key in given if key not in own]:
        known = ", ".join(f"--{key}" for key in own) or "none"
        raise ValueError(f"unknown option {', '.join(strange)} of {arguments.to}; known: {known}")
    for key in {"names", "layers"} & given.keys():
        given[key] = read_object(given[key])
    if arguments.to == "ncnn" and "layers" not in given:
        raise ValueError("expected --layers, as a file does not say which layer reads what")
    model = read_quantizers(arguments.file)
    if arguments.without:
        set_fake_quantize(model, "float", pattern=arguments.without)
    done = write(model, path=arguments.output, **given)
    if arguments.json:
        print_json(asdict(done))
    else:
        print(done)
    return 0


def write_report(arguments: argparse.Namespace) -> int:
    """Writes an HTML page about every quantizer."""
    if (suffix := Path(arguments.output).suffix.lower()) not in _PAGES:
        raise ValueError(
            f"expected --output to end in {' or '.join(_PAGES)}, got {suffix or 'no suffix'!r}"
        )
    summary = report(arguments.file, arguments.output, progress=_progress(arguments))
    if arguments.json:
        print_json(asdict(summary))
    else:
        print(summary)
    return 0


def compare_files(arguments: argparse.Namespace) -> int:
    """Ranges and scales of two files side by side."""
    first, second = (read_observer_params(file) for file in (arguments.a, arguments.b))
    found = compare(first, second)
    if arguments.json:
        print_json(_comparison(found, first, second))
    else:
        rows = [_compared(row, first[row.name], second[row.name]) for row in found.rows]
        shown = rows[: arguments.top]
        if shown:
            header = ("quantizer", "difference", "range A", "range B", "scale A", "scale B")
            print_table((*header, "zero point", "observers"), shown)
        if len(shown) < len(rows):
            print(f"... and {len(rows) - len(shown)} that differ less")
        for side, names in (("A", found.only_first), ("B", found.only_second)):
            if names:
                print(f"only in {side}: {', '.join(name or _ROOT for name in names)}")
        differing = sum(row.largest > 0 for row in found.rows)
        print(f"{len(rows)} quantizers in both, {differing} of them differ")
    fine = arguments.tolerance is None or found.within(arguments.tolerance)
    return 0 if fine else 1


def _check_output(path: str | None) -> None:
    if path is not None and Path(path).suffix.lower() not in _SUFFIXES:
        raise ValueError(f"expected --output to end in .safetensors, got {path!r}")


def _progress(arguments: argparse.Namespace) -> bool | None:
    return False if arguments.quiet else None


def _show(
    arguments: argparse.Namespace, model: SavedQuantizers, chosen: Mapping[str, FakeQuantize]
) -> None:
    solved = {n: (q.observer, q.range) for n, q in chosen.items() if bool(q.solved)}
    notes = [note.strip() for note in findings(solved)]
    if arguments.json:
        quantizers = {name: _record(name, quantizer) for name, quantizer in chosen.items()}
        print_json({"file": os.fspath(arguments.file), "quantizers": quantizers, "notes": notes})
        return
    rows = []
    for row in describe(model).quantizers:
        if row.name not in chosen:
            continue
        params = params_of(chosen[row.name])
        finite, _, _, infinite, nan = params["observer.tally"].sum(0).tolist()
        rows.append(
            [
                *(row.name or _ROOT, row.of, row.observer, row.grid),
                *(_range(params), row.scale, _zero_point(params)),
                *(str(finite), f"{infinite}, {nan}" if infinite or nan else ""),
            ]
        )
    header = ("quantizer", "of", "observer", "grid", "range", "scale", "zero point")
    print_table((*header, "values", "inf, nan"), rows)
    for note in notes:
        print(f"note: {note}")


def _record(name: str, quantizer: FakeQuantize) -> dict[str, Any]:
    params = params_of(quantizer)
    finite, zeros, tiny, infinite, nan = params["observer.tally"].sum(0).tolist()
    extrema = params["observer.extrema"]
    return {
        "of": role_of(name, quantizer),
        **params.spec,
        "solved": params.solved,
        "synced": params.synced,
        **{field: params[field].tolist() for field in ("range", "scale", "zero_point")},
        "values": {
            "finite": finite,
            "zeros": zeros,
            "tiny": tiny,
            "infinite": infinite,
            "nan": nan,
            "minimum": float(extrema[:, 0].min()),
            "maximum": float(extrema[:, 1].max()),
        },
    }


def _comparison(
    found: Comparison, first: Mapping[str, Params], second: Mapping[str, Params]
) -> dict[str, Any]:
    def side(params: Params) -> dict[str, Any]:
        fields = ("range", "scale", "zero_point")
        values = {field: params[field].tolist() for field in fields} if params.solved else {}
        return {"observer": params.observer, **values}

    rows = [
        {**asdict(row), "a": side(first[row.name]), "b": side(second[row.name])}
        for row in found.rows
    ]
    return {"quantizers": rows, "only_a": found.only_first, "only_b": found.only_second}


def _compared(row: Difference, one: Params, two: Params) -> list[str]:
    observers = dict.fromkeys((one.observer, two.observer))
    return [
        *(row.name or _ROOT, row.note or _percent(row.largest)),
        *(_range(one), _range(two), _scale(one), _scale(two)),
        *(f"{row.zero_point} apart" if row.zero_point else "", ", ".join(observers)),
    ]


def _percent(difference: float) -> str:
    return f"{100 * difference:.3g} %" if difference else "equal"


def _range(params: Params) -> str:
    if not params.solved:
        return ""
    low, high = float(params["range"][:, 0].min()), float(params["range"][:, 1].max())
    return f"[{low:.6g}, {high:.6g}]"


def _scale(params: Params) -> str:
    return _span(params, "scale") if params.solved else ""


def _zero_point(params: Params) -> str:
    return _span(params, "zero_point") if params.solved else ""


def _span(params: Params, field: str) -> str:
    low, high = float(params[field].min()), float(params[field].max())
    return f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
