"""What is asked of one model. Each check adds to a record, which is kept after each of them."""

from __future__ import annotations

import copy
import inspect
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor, nn

import torch_ext
from torch_ext import export, named_quantizers, prepare_qat, set_fake_quantize
from zoo import compare, grid, peer, table
from zoo.corrections import corrections
from zoo.entry import Entry, Inputs, inputs_of, made
from zoo.table import shortened

Record = dict[str, Any]
_CLOSE = 30.0  # dB: onnxruntime sums in another order, which moves single values by a step


class Subject:
    """One model on its way through the checks."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.plain = made(entry)
        self.batches = [inputs_of(entry, seed) for seed in (0, 1)]
        self.prepared: nn.Module | None = None
        self.trains, self.has_gradients = True, True
        self.float_outputs: Any = None

    @property
    def example(self) -> Any:
        """The first batch as ``example_inputs``."""
        args, kwargs = self.batches[0]
        if not kwargs:
            return args
        names = list(inspect.signature(self.plain.forward).parameters)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    @property
    def model(self) -> nn.Module:
        assert self.prepared is not None
        return self.prepared


def run(model: nn.Module, inputs: Inputs) -> Any:
    """A call on copies, as some forwards write to their arguments."""
    args, kwargs = copy.deepcopy(inputs)
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    return model(*args, **kwargs)


def prepare(subject: Subject, record: Record) -> None:
    model = copy.deepcopy(subject.plain)
    model.qconfig = torch_ext.get_default_qconfig()  # type: ignore[assignment]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        subject.prepared = prepare_qat(model, example_inputs=subject.example)
    texts = [table.without_paths(str(one.message)) for one in caught]
    record["warnings"] = [text for text in texts if "prepare_qat" in text]
    record["quantizers"] = len(named_quantizers(subject.model))
    record["prepared"] = True
    try:
        run(copy.deepcopy(subject.plain).train(), subject.batches[0])
    except Exception as error:
        subject.trains = False
        record["trains"] = f"the float model does not: {shortened(error)}"


def float_equal(subject: Subject, record: Record) -> None:
    """Outputs, buffers, random state and gradients of FLOAT against the untouched model's."""
    plain, prepared = copy.deepcopy(subject.plain), copy.deepcopy(subject.model)
    for mode in ("eval", "train") if subject.trains else ("eval",):
        found = []
        for model in (plain, prepared):
            model.train(mode == "train").zero_grad()
            output = run(model, subject.batches[0])
            state = torch.get_rng_state()
            loss = _loss(output)
            if subject.has_gradients and loss is not None and loss.requires_grad:
                try:
                    loss.backward()
                except RuntimeError as error:
                    if model is not plain:
                        raise
                    subject.has_gradients = False
                    model.zero_grad()
                    record["gradients"] = f"the float model does not: {shortened(error)}"
            found.append((output, state, _gradients(model), _buffers(model)))
        (out, state, gradients, buffers), (out2, state2, gradients2, buffers2) = found
        problem = compare.difference(out, out2)
        if not problem and not torch.equal(state, state2):
            problem = "random state"
        problem = problem or _first_difference("gradient", gradients, gradients2)
        problem = problem or _first_difference("buffer", buffers, buffers2)
        record[f"float_{mode}"] = problem or "equal"
    with torch.no_grad():
        subject.plain.eval()
        subject.float_outputs = run(copy.deepcopy(subject.plain), subject.batches[1])


def coverage(subject: Subject, record: Record) -> None:
    """Calibrates; VALIDATION against float; the share of calls whose operands are on a grid."""
    model = subject.model.eval()
    with torch.no_grad():
        for mode in ("eval", "train") if subject.trains else ("eval",):
            if mode == "train":  # which changes norms; other checks go on from eval mode
                model = copy.deepcopy(model).train()
            set_fake_quantize(model, "calibration")
            for batch in subject.batches:
                with _WithoutDropout() if mode == "train" else _Nothing():
                    run(model, batch)
            set_fake_quantize(model, "validation", allow_unobserved=mode == "eval")
            if mode == "eval":
                record["sqnr"] = compare.sqnr(subject.float_outputs, run(model, subject.batches[1]))
            scales = [q.calculate_qparams()[0] for q in named_quantizers(model).values()]
            on, total, off = _shares(model, scales, subject.batches)
            record[f"calls_{mode}"] = [on, total]
            record[f"off_{mode}"] = off[:8]
    model.eval()


def _shares(
    model: nn.Module, scales: list[Tensor], batches: list[Inputs]
) -> tuple[int, int, list[str]]:
    counted: list[list[grid.Call]] = []
    for batch in batches:
        with grid.GridCount(scales) as counting:
            run(model, batch)
        counted.append(counting.calls)
        if grid.all_on_grid(counting.calls):  # no constants to leave out
            break
    return grid.shares(counted[0], counted[-1])


class _Nothing:
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...


class _WithoutDropout(grid.GridCount):
    """Only passes dropouts on."""

    def __init__(self) -> None:
        super().__init__([])

    def _note(self, name: str, operands: Any) -> None: ...


def qat_step(subject: Subject, record: Record) -> None:
    if not subject.has_gradients:
        record["qat"] = record["gradients"]
        return
    model = copy.deepcopy(subject.model).train(subject.trains)
    set_fake_quantize(model, "qat")
    model.zero_grad()
    loss = _loss(run(model, subject.batches[0]))
    if loss is None or not loss.requires_grad:
        record["qat"] = "no output with a gradient"
        return
    loss.backward()
    bad = [k for k, g in _gradients(model).items() if not bool(g.isfinite().all())]
    record["qat"] = "ok" if bool(loss.isfinite()) and not bad else f"not finite: loss, {bad[:2]}"


def compiled(subject: Subject, record: Record) -> None:
    """One graph without breaks, and the bits of eager."""
    model = subject.model.eval()
    set_fake_quantize(model, "validation", allow_unobserved=True)
    with torch.no_grad():
        expected = run(model, subject.batches[0])
        torch._dynamo.reset()
        torch._dynamo.config.allow_rnn = True
        try:
            made_graph = torch.compile(model, fullgraph=True, backend="eager")
            got = run(made_graph, subject.batches[0])
        except Exception as error:
            record["compile"] = shortened(error)
            torch._dynamo.reset()
            try:
                plain = copy.deepcopy(subject.plain).eval()
                run(torch.compile(plain, fullgraph=True, backend="eager"), subject.batches[0])
            except Exception as other:
                record["compile"] = f"the float model does not: {shortened(other)}"
            return
        problem = compare.difference(compare.tensors(expected), compare.tensors(got))
        record["compile"] = f"differs: {problem}" if problem else "equal"


def onnx_file(subject: Subject, record: Record) -> None:
    """Exported, and run by onnxruntime against VALIDATION."""
    model = subject.model.eval()
    set_fake_quantize(model, "validation", allow_unobserved=True)
    args, kwargs = copy.deepcopy(subject.batches[0])
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        try:
            export.onnx(model, subject.example, path, dynamic_batch=False)
        except Exception as error:
            record["onnx"] = shortened(error)
            try:
                plain = copy.deepcopy(subject.plain).eval()
                torch.onnx.export(plain, args, kwargs=kwargs, dynamo=True, verbose=False)
            except Exception as other:
                record["onnx"] = f"the float model does not: {shortened(other)}"
            return
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        # Its optimised kernels add in integers, with another rounding.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(str(path), options)
        given = compare.tensors([args, kwargs])
        feeds = {i.name: t.numpy() for i, t in zip(session.get_inputs(), given, strict=False)}
        results = [torch.from_numpy(y) for y in session.run(None, feeds)]
        expected = compare.tensors(run(model, subject.batches[0]))
        close = compare.sqnr(expected, results)
        record["onnx_sqnr"] = close
        record["onnx"] = "equal" if close is not None and close > _CLOSE else f"{close} dB"


def by_pt2e(subject: Subject, record: Record) -> None:
    """torchao's PT2E on the same model and batches."""
    plain = copy.deepcopy(subject.plain).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            graph = peer.converted(plain, copy.deepcopy(subject.batches))
            expected = run(copy.deepcopy(subject.plain).eval(), subject.batches[1])
            record["pt2e_sqnr"] = compare.sqnr(expected, run(graph, subject.batches[1]))
            record["pt2e_calls"] = list(_shares(graph, peer.scales(graph), subject.batches)[:2])
            record["pt2e"] = True
        except Exception as error:
            record["pt2e"] = shortened(error)


def corrected(subject: Subject, record: Record) -> None:
    record |= corrections(subject.plain, subject.example, subject.batches[0], run)


CHECKS: dict[str, Callable[[Subject, Record], None]] = {
    "prepare": prepare,
    "float": float_equal,
    "coverage": coverage,
    "qat": qat_step,
    "corrections": corrected,
    "pt2e": by_pt2e,
    "compile": compiled,
    "onnx": onnx_file,
}


def check(entry: Entry, chosen: list[str], keep: Callable[[Record], None]) -> None:
    """Runs the checks in order; the first failure of the first three ends those that need them."""
    # Without gradients torch runs attention by fused kernels, which round otherwise.
    torch.backends.mha.set_fastpath_enabled(False)
    record: Record = {"name": entry.name, "checks": chosen, "doing": "making the float model"}
    keep(record)
    subject = Subject(entry)
    for name, step in CHECKS.items():
        if name not in chosen or (name != "pt2e" and "failed" in record):
            continue
        record["doing"] = name
        keep(record)
        began = time.perf_counter()
        try:
            step(subject, record)
        except Exception as error:
            if name == "prepare":
                record["prepared"] = shortened(error, 400)
            record["failed"] = f"{name}: {shortened(error, 400)}"
        record.setdefault("seconds", {})[name] = round(time.perf_counter() - began, 2)
        keep(record)
    record["doing"] = ""
    keep(record)


def _loss(output: Any) -> Tensor | None:
    terms = [t.square().mean() for t in compare.tensors(output) if t.is_floating_point()]
    terms = [t for t in terms if t.requires_grad and bool(t.isfinite())]
    return torch.stack(terms).sum() if terms else None


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        key = name.replace("parametrizations.", "").removesuffix(".original")
        if parameter.grad is not None:
            found[key] = parameter.grad
    return found


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    own = {f"{name}." for name in named_quantizers(model)}
    return {k: b for k, b in model.named_buffers() if not any(k.startswith(p) for p in own)}


def _first_difference(what: str, a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    if a.keys() != b.keys():
        return f"{what}: {sorted(a.keys() ^ b.keys())[:2]}"
    for name, value in a.items():
        if not compare.same_bits(value, b[name]):
            return f"{what} {name}"
    return ""
