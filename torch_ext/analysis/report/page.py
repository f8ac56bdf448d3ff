"""The HTML page of a report: it loads nothing, and can be read without scripts, too."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence

from torch_ext import _C
from torch_ext.analysis.report.advice import Note
from torch_ext.analysis.report.picture import colour_of, picture
from torch_ext.analysis.report.quality import RuleLine
from torch_ext.analysis.report.quantizer_report import QuantizerReport
from torch_ext.analysis.rule_choices import choice
from torch_ext.utils.text import label_of

_STYLE = """
body{font:14px/1.45 sans-serif;color:#222;margin:24px;max-width:1500px}
h1{font-size:22px}h2{font-size:17px;margin-top:28px}
table{border-collapse:collapse}th,td{padding:2px 8px;text-align:right;white-space:nowrap}
th{background:#f0f0f0;position:sticky;top:0;border-bottom:1px solid #bbb}
th:first-child,td:first-child,td.t,th.t{text-align:left}
#overview th{cursor:pointer}tbody tr:nth-child(even){background:#f8f8f8}
th[aria-sort=ascending]::after{content:" \\25b2"}th[aria-sort=descending]::after{content:" \\25bc"}
.scroll{overflow:auto;max-height:75vh;border:1px solid #ddd}
.flag{background:#b3261e;color:#fff;border-radius:3px;padding:0 5px;font-size:12px}
details{border-top:1px solid #ddd;padding:4px 0}summary{cursor:pointer}
.both{display:flex;flex-wrap:wrap;gap:24px}ul{margin:6px 0}.hint{color:#555}
i{display:inline-block;width:11px;height:11px;margin-right:6px}
code{background:#f3f3f3}
"""

# Sorts the table by the cells' data-v, empty ones last; opens the section that a link leads to;
# filters table and sections by name.
_SCRIPT = """
const table=document.getElementById("overview"),body=table.tBodies[0];
table.tHead.addEventListener("click",event=>{
  const head=event.target.closest("th");if(!head)return;
  const up=head.getAttribute("aria-sort")!=="ascending",at=head.cellIndex;
  for(const cell of table.tHead.rows[0].cells)cell.removeAttribute("aria-sort");
  head.setAttribute("aria-sort",up?"ascending":"descending");
  const text=head.classList.contains("t"),value=row=>row.cells[at].dataset.v;
  const order=(a,b)=>text?(a<b?-1:a>b?1:0):a-b;
  body.append(...[...body.rows].sort((a,b)=>{
    const x=value(a),y=value(b);
    if(x===""||y==="")return(x==="")-(y==="");
    return up?order(x,y):order(y,x);
  }));
});
function open(){const to=document.getElementById(location.hash.slice(1));if(to)to.open=true}
addEventListener("hashchange",open);open();
document.getElementById("filter").addEventListener("input",event=>{
  const words=event.target.value.toLowerCase();
  for(const part of document.querySelectorAll("[data-name]"))
    part.hidden=!part.dataset.name.toLowerCase().includes(words);
});
"""

Cell = tuple[str, float | str]  # the text, and the value that the column is sorted by


def page(title: str, about: str, subjects: Sequence[tuple[QuantizerReport, list[Note]]]) -> str:
    """The whole page; `about` is a sentence below the title, `subjects` are the quantizers."""
    body = "\n".join(
        _section(index, subject, notes) for index, (subject, notes) in enumerate(subjects)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<p>{html.escape(about)} torch_ext {html.escape(_C.build_info()["version"])}.</p>
{_warnings(subjects)}
<h2>Overview</h2>
<p><input id="filter" placeholder="filter by name" size="40"> A click on a column sorts by it.</p>
<div class="scroll">{_overview(subjects)}</div>
<h2>Quantizers</h2>
{body}
<script>{{{_SCRIPT}}}</script>
</body></html>
"""


def _warnings(subjects: Sequence[tuple[QuantizerReport, list[Note]]]) -> str:
    rows = [
        f"<li>{_link(index, subject)} {_flag(note)} {html.escape(note.text)}</li>"
        for index, (subject, notes) in enumerate(subjects)
        for note in notes
        if note.flag
    ]
    if not rows:
        return "<h2>Warnings</h2><p>None.</p>"
    return f'<h2>Warnings ({len(rows)})</h2><ul id="warnings">{"".join(rows)}</ul>'


def _link(index: int, subject: QuantizerReport) -> str:
    return f'<a href="#q{index}">{html.escape(_name(subject))}</a>'


def _name(subject: QuantizerReport) -> str:
    return label_of(subject.name)


def _flag(note: Note) -> str:
    return f'<span class="flag">{html.escape(note.flag)}</span>'


def _rule(subject: QuantizerReport) -> str:
    """The rule with its options; before it the method, if the quantizer learns its range."""
    params = subject.params
    rule = str(choice(params.observer, params.spec["options"]))
    method = params.spec["method"]
    return rule if method == "fake_quant" else f"{method}, from {rule}"


def _grid(subject: QuantizerReport) -> str:
    params = subject.params
    scheme = params.spec["qscheme"].replace("_", " ")
    if params.is_dynamic:
        size = params.spec["group_size"]
        scheme = scheme.replace("per tensor", f"dynamic groups of {size}" if size else "dynamic")
    return f"{params.spec['dtype']} [{params.quant_min}, {params.quant_max}], {scheme}"


def number(value: float, digits: int = 4) -> Cell:
    """A cell of a number with so many significant digits; an empty cell for NaN."""
    if math.isnan(value):
        return "", ""
    return f"{value:.{digits}g}", value


def _share(value: float) -> Cell:
    return number(100 * value, 3)


def _span(low: float, high: float) -> Cell:
    return (f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"), high


_Getter = Callable[[QuantizerReport], Cell]
_Column = tuple[str, str, bool, _Getter]


def _columns() -> list[_Column]:
    """The overview's columns: head, explanation, whether it is text, and the cell."""

    def text(get: Callable[[QuantizerReport], str]) -> _Getter:
        return lambda subject: (get(subject), get(subject))

    def solved(get: _Getter) -> _Getter:
        return lambda subject: get(subject) if subject.params.solved else ("", "")

    def quality(field: str, cell: Callable[[float], Cell]) -> _Getter:
        return lambda subject: (
            cell(getattr(subject.quality, field)) if subject.quality else ("", "")
        )

    def span(subject: QuantizerReport) -> Cell:
        scale = subject.params["scale"]
        return _span(float(scale.min()), float(scale.max()))

    def zeros(subject: QuantizerReport) -> Cell:
        finite, zero, *_ = subject.counts
        return _share(zero / finite) if finite else ("", "")

    return [
        ("of", "what it quantizes", True, text(lambda s: s.of)),
        ("rule", "by which its range is solved", True, text(_rule)),
        ("grid", "dtype, quant_min and quant_max, scheme", True, text(_grid)),
        ("low", "end of the range; the least channel's", False,
         solved(lambda s: number(float(s.params["range"][:, 0].min())))),
        ("high", "end of the range; the largest channel's", False,
         solved(lambda s: number(float(s.params["range"][:, 1].max())))),
        ("scale", "the step; sorted by the largest channel's", False, solved(span)),
        ("clipped, %", "values further than half a step from their quantized value", False,
         quality("clipped", _share)),
        ("SQNR, dB", "power of the values over that of the quantization error", False,
         quality("sqnr", lambda v: number(v, 3))),
        ("cosine", "of the angle between values and quantized values", False,
         quality("cosine", lambda v: number(v, 6))),
        ("zeros, %", "values that are 0", False, zeros),
        ("to zero, %", "other values that are quantized to 0", False,
         quality("to_zero", _share)),
    ]  # fmt: skip


def _overview(subjects: Sequence[tuple[QuantizerReport, list[Note]]]) -> str:
    columns = _columns()
    head = '<th class="t">quantizer</th>'
    for title, hint, text, _ in columns:
        kind = ' class="t"' if text else ""
        head += f'<th{kind} title="{html.escape(hint)}">{html.escape(title)}</th>'
    head += '<th class="t">flags</th>'
    rows = []
    for index, (subject, notes) in enumerate(subjects):
        name = html.escape(_name(subject))
        cells = f'<td data-v="{name}">{_link(index, subject)}</td>'
        for _, _, text, cell in columns:
            shown, key = cell(subject)
            kind = ' class="t"' if text else ""
            cells += f'<td{kind} data-v="{html.escape(str(key))}">{html.escape(shown)}</td>'
        flags = [note for note in notes if note.flag]
        words = html.escape(" ".join(note.flag for note in flags))
        cells += f'<td class="t" data-v="{words}">{" ".join(map(_flag, flags))}</td>'
        rows.append(f'<tr data-name="{name}">{cells}</tr>')
    body = "\n".join(rows)
    return f'<table id="overview"><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _section(index: int, subject: QuantizerReport, notes: list[Note]) -> str:
    """A quantizer's section: facts, findings, picture, and the comparison of rules."""
    name = html.escape(_name(subject))
    findings = "".join(
        f"<li>{_flag(note) if note.flag else ''} "
        f"<span{'' if note.flag else ' class=hint'}>{html.escape(note.text)}</span></li>"
        for note in notes
    )
    finite, zeros, _, infinite, nan = subject.counts
    facts = f"{subject.of}; {_rule(subject)}; {_grid(subject)}; {finite:,} values"
    facts += f", {zeros:,} of them 0" if zeros else ""
    facts += f"; {infinite:,} infinite, {nan:,} NaN" if infinite or nan else ""
    if subject.quality is not None:
        facts += f"; measured on {subject.source}"
    flags = " ".join(_flag(note) for note in notes if note.flag)
    return (
        f'<details id="q{index}" data-name="{name}"><summary>{name} {flags}</summary>'
        f"<p>{html.escape(facts)}</p><ul>{findings}</ul>"
        f'<div class="both">{picture(subject)}{_rules(subject)}</div></details>'
    )


def _rules(subject: QuantizerReport) -> str:
    """The table of rules: the range in use, then the rules from the least noise on."""
    lines = sorted(subject.lines, key=_order)
    if not lines:
        return ""
    rows = [_rule_row(subject, line) for line in [subject.in_use, *lines] if line is not None]
    head = ["rule", "range", "clipped, %", "to zero, %", "SQNR, dB", "cosine"]
    if subject.channels > 1:
        head[1] = "of the largest"
    cells = "".join(f"<th>{title}</th>" for title in head)
    caption = ""
    if subject.compared < subject.channels:
        kind = "channels" if subject.params.group_size is None else "groups"
        caption = f"<caption>on {subject.compared} of {subject.channels} {kind}</caption>"
    return f"<table>{caption}<thead><tr>{cells}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _order(line: RuleLine) -> float:
    """Sort key: the highest SQNR first, NaN last."""
    sqnr = line.quality.sqnr
    return math.inf if math.isnan(sqnr) else -sqnr


def _rule_row(subject: QuantizerReport, line: RuleLine) -> str:
    quality = line.quality
    low, high = line.range[0].tolist()
    reach = f"{line.share:.3f}" if subject.channels > 1 else f"{low:.4g} to {high:.4g}"
    cells = [
        reach,
        _share(quality.clipped)[0],
        _share(quality.to_zero)[0],
        number(quality.sqnr, 3)[0],
        number(quality.cosine, 6)[0],
    ]
    swatch = f'<i style="background:{colour_of(line)}"></i>{html.escape(line.label)}'
    return f"<tr><td>{swatch}</td>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
