"""Prepares and checks the models of the zoo, each in a process of its own.

python benchmarks/run_zoo.py                      all of them; hours on a laptop
python benchmarks/run_zoo.py --only 'timm/*'      those whose name matches; several apart by commas
python benchmarks/run_zoo.py --resume             only those without a result for the checks
python benchmarks/run_zoo.py --checks prepare,float,coverage
python benchmarks/run_zoo.py --save               results/<date>-zoo.json and docs/reference/zoo.md;
                                                  what did not run now is as in the last record
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import json
import multiprocessing
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

from zoo import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "build" / "zoo"
SAVED = ROOT / "benchmarks" / "results"
GROUPS = ("plain", "torchvision", "timm", "transformers", "ultralytics")
CHECKS = ("prepare", "float", "coverage", "qat", "corrections", "pt2e", "compile", "onnx")


def options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="names, with * and ?, apart by commas")
    parser.add_argument("--checks", default=",".join(CHECKS), help="of " + ", ".join(CHECKS))
    parser.add_argument("--resume", action="store_true", help="keep the results that there are")
    parser.add_argument("--jobs", type=int, default=1, help="models at a time")
    parser.add_argument("--limit", type=int, default=600, help="seconds a model may take")
    parser.add_argument("--save", action="store_true", help="write the record and the table")
    given = parser.parse_args(arguments)
    unknown = sorted({*given.checks.split(",")} - {*CHECKS})
    if unknown:
        parser.error(f"expected --checks to be of {', '.join(CHECKS)}, got {', '.join(unknown)}")
    return given


def result_file(name: str) -> Path:
    return RESULTS / f"{name.replace('/', '+')}.json"


def known(name: str) -> dict[str, Any]:
    path = result_file(name)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def _keep(record: dict[str, Any]) -> None:
    path = result_file(record["name"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps(record, indent=1))
    os.replace(part, path)


def _child(entry: Any, checks: list[str]) -> None:
    log = os.open(
        result_file(entry.name).with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    )
    os.dup2(log, 1)
    os.dup2(log, 2)
    importlib.import_module("zoo.checks").check(entry, checks, _keep)


def _ended(entry: Any, process: Any, late: bool) -> str:
    """Notes how a process ended, if not by itself; one line for the screen."""
    record = known(entry.name)
    if late:
        record["failed"] = f"{record.get('doing')}: took longer than the limit"
    elif process.exitcode:
        how = f"signal {-process.exitcode}" if process.exitcode < 0 else "an error"
        record["failed"] = f"{record.get('doing')}: the process ended by {how}"
        if process.exitcode > 0:
            log = result_file(entry.name).with_suffix(".log").read_text(errors="replace")
            record["failed"] += f": {log.strip().splitlines()[-1][:200]}" if log.strip() else ""
    _keep(record)
    seconds = sum(record.get("seconds", {}).values())
    return f"{entry.name:50} {seconds:6.1f} s  {table.verdict(record)}"


def run_group(entries: list[Any], given: argparse.Namespace) -> None:
    importlib.import_module("zoo.checks")  # once, before the processes part
    context = multiprocessing.get_context("fork")
    waiting, running = list(entries), []
    checks = given.checks.split(",")
    while waiting or running:
        while waiting and len(running) < given.jobs:
            entry = waiting.pop(0)
            process = context.Process(target=_child, args=(entry, checks))
            process.start()
            running.append((entry, process, time.monotonic()))
        time.sleep(0.05)
        for one in list(running):
            entry, process, began = one
            late = process.is_alive() and time.monotonic() - began > given.limit
            if late:
                process.kill()
                process.join()
            if not process.is_alive():
                process.join()
                running.remove(one)
                print(_ended(entry, process, late), flush=True)


def with_last(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records, by name, with what the last saved ones have of other checks and models."""
    saved = sorted(SAVED.glob("*-zoo.json"))
    found = {r["name"]: r for r in (json.loads(saved[-1].read_text()) if saved else [])}
    for record in records:
        old = dict(found.get(record["name"], {}))
        if old.get("failed", "").partition(":")[0] in record["checks"]:
            del old["failed"]
        new = old | record
        new["checks"] = [c for c in CHECKS if c in (*old.get("checks", ()), *record["checks"])]
        new["seconds"] = old.get("seconds", {}) | record.get("seconds", {})
        found[record["name"]] = new
    return [found[name] for name in sorted(found)]


def _plain(value: Any) -> Any:
    """Texts without the folders of this machine; names are no paths."""
    if isinstance(value, dict):
        return {key: entry if key == "name" else _plain(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_plain(entry) for entry in value]
    return table.without_paths(value) if isinstance(value, str) else value


def main(arguments: list[str]) -> None:
    given = options(arguments)
    RESULTS.mkdir(parents=True, exist_ok=True)
    patterns = given.only.split(",")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for group in GROUPS:
        if not any(fnmatch.fnmatch(f"{group}/", p.partition("/")[0] + "/") for p in patterns):
            continue
        entries = importlib.import_module(f"zoo.nets.{group}_nets").entries()
        chosen = [e for e in entries if any(fnmatch.fnmatch(e.name, p) for p in patterns)]
        if given.resume:
            wanted = {*given.checks.split(",")}
            chosen = [e for e in chosen if not wanted <= {*known(e.name).get("checks", ())}]
        run_group(chosen, given)
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    print(table.totals(records))
    if given.save:
        every = [importlib.import_module(f"zoo.nets.{group}_nets").entries() for group in GROUPS]
        names = {entry.name for entries in every for entry in entries}
        records = [record for record in with_last(records) if record["name"] in names]
        path = SAVED / f"{date.today().isoformat()}-zoo.json"
        path.write_text(json.dumps(_plain(records), indent=1) + "\n")
        (ROOT / "docs" / "reference" / "zoo.md").write_text(table.page(records))
        print(f"wrote {path.relative_to(ROOT)} and docs/reference/zoo.md")


if __name__ == "__main__":
    main(sys.argv[1:])
