"""The zoo's results as the page docs/reference/zoo.md, and in a line for the screen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
# What a check says where the float model itself cannot do it.
NOT_OURS = "the float model does not"
_GROUPS = ("plain", "torchvision", "timm", "transformers", "ultralytics")
_CORRECTIONS = ("equalize", "correct_bias", "reconstruct")

_HEAD = Path(__file__).with_name("page.md")
_ROOT = Path(__file__).resolve().parents[2]


def verdict(record: Record) -> str:
    return "; ".join(problems(record)) or f"ok {record.get('sqnr')} dB"


def problems(record: Record) -> list[str]:
    """What is not as it should be, one text each."""
    found = []
    if "failed" in record:
        found.append(str(record["failed"]))
    for mode in ("eval", "train"):
        if record.get(f"float_{mode}", "equal") != "equal":
            found.append(f"FLOAT differs in {mode} mode: {record[f'float_{mode}']}")
        on, total = record.get(f"calls_{mode}", (0, 0))
        if on < total:
            where = "; ".join(record[f"off_{mode}"][:3])
            found.append(f"{total - on} of {total} calls off the grid in {mode} mode ({where})")
    goods = {"qat": "ok", **dict.fromkeys(_CORRECTIONS, "ok"), "compile": "equal", "onnx": "equal"}
    for key, good in goods.items():
        told = str(record.get(key, good))
        if told != good and not told.startswith(NOT_OURS):
            found.append(f"{key}: {told}")
    return found


def totals(records: list[Record]) -> str:
    perfect = sum(not problems(record) for record in records)
    return f"{len(records)} models, {perfect} without a remark"


def page(records: list[Record]) -> str:
    """The whole page, for the records of all models."""
    columns = [
        "",
        "prepared",
        "eval",
        "train",
        "on a grid",
        "SQNR",
        "QAT",
        *_CORRECTIONS,
        "compile",
        "ONNX",
        "PT2E",
    ]
    lines = [f"{_HEAD.read_text()}| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    groups = [(g, [r for r in records if r["name"].startswith(f"{g}/")]) for g in _GROUPS]
    for name, members in (*groups, ("all", records)):
        if members:
            lines.append(f"| {name} | " + " | ".join(_row(members)) + " |")
    left = [f"| {r['name']} | {_plain(problem)} |" for r in records for problem in problems(r)]
    lines += ["", "## What is left", ""]
    lines += ["| model | remark |", "|---|---|", *left] if left else ["Nothing, of those tried."]
    lines += ["", "## All models", "", "| model | quantizers | on a grid | SQNR | PT2E |"]
    lines.append("|---|---|---|---|---|")
    for record in records:
        lines.append(f"| {record['name']} | " + " | ".join(_model(record)) + " |")
    return "\n".join(lines) + "\n"


def _row(members: list[Record]) -> list[str]:
    modes = ("eval", "train")
    on, total = (
        sum(sum(r.get(f"calls_{m}", (0, 0))[i] for m in modes) for r in members) for i in (0, 1)
    )
    peers = [r for r in members if r.get("pt2e") is True and "pt2e_calls" in r]
    peer_on, peer_total = (sum(r["pt2e_calls"][i] for r in peers) for i in (0, 1))
    of_peer = _count(members, "pt2e", lambda v: v is True)
    if peers:
        of_peer += f"; {peer_on} of {peer_total}; {_median([r.get('pt2e_sqnr') for r in peers])}"
    return [
        _count(members, "prepared", lambda v: v is True),
        _count(members, "float_eval", lambda v: v == "equal"),
        _count(members, "float_train", lambda v: v == "equal"),
        f"{on} of {total}",
        _median([r.get("sqnr") for r in members]),
        _count(members, "qat", lambda v: v == "ok"),
        *(_count(members, name, lambda v: v == "ok") for name in _CORRECTIONS),
        _count(members, "compile", lambda v: v == "equal"),
        _count(members, "onnx", lambda v: v == "equal"),
        of_peer,
    ]


def _count(members: list[Record], key: str, good: Callable[[Any], bool]) -> str:
    told = [r[key] for r in members if key in r and not str(r[key]).startswith(NOT_OURS)]
    return f"{sum(map(good, told))} of {len(told)}"


def _median(numbers: list[float | None]) -> str:
    known = sorted(n for n in numbers if n is not None)
    return f"{known[len(known) // 2]:.1f}" if known else ""


def _model(record: Record) -> list[str]:
    calls = [record.get(f"calls_{mode}", (0, 0)) for mode in ("eval", "train")]
    on, total = (sum(call[i] for call in calls) for i in (0, 1))
    peer = record.get("pt2e", "")
    if peer is True:
        peer = f"{record.get('pt2e_sqnr')}"
        if "pt2e_calls" in record:
            peer += " dB; {} of {}".format(*record["pt2e_calls"])
    known = record.get("sqnr")
    return [
        str(record.get("quantizers", "")),
        f"{on} of {total}",
        "" if known is None else str(known),
        _plain(str(peer)),
    ]


def without_paths(text: str) -> str:
    """Without the folders of this machine."""
    text = re.sub(r"/\S*?/site-packages/", "", text).replace(f"{_ROOT}/", "")
    return re.sub(r"[`'\"]?/[\w./+-]*$", "…", text)


def shortened(error: BaseException, limit: int = 160) -> str:
    """An error's type and the beginning of its text."""
    text = without_paths(" ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:limit]}"


def _plain(text: str) -> str:
    """For a cell of a table, on one line."""
    short = without_paths(" ".join(text.split())).replace("|", "\\|").replace("<", "&lt;")
    return short if len(short) < 240 else short[:239] + "…"
