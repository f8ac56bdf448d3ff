"""The zoo's results in words."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
NOT_OURS = "the float model does not"


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
    for key, good in (("qat", "ok"), ("compile", "equal"), ("onnx", "equal")):
        told = str(record.get(key, good))
        if told != good and not told.startswith(NOT_OURS):
            found.append(f"{key}: {record[key]}")
    return found


def totals(records: list[Record]) -> str:
    perfect = sum(not problems(record) for record in records)
    return f"{len(records)} models, {perfect} without a remark"


def page(records: list[Record]) -> str:
    return totals(records)
