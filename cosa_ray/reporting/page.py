"""A comparison as one HTML page that needs nothing else: no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from cosa_ray import __version__
from cosa_ray.reporting.charts import confusion_map, curve, interval_bar, look
from cosa_ray.reporting.differences import Compared, Comparison, MetricRow
from cosa_ray.reporting.history import Chart
from cosa_ray.reporting.pictures import Pictures, confusion_difference
from cosa_ray.reporting.words import cost, duration, interval, mean, number, settings, steps

_HERE = Path(__file__).resolve().parent
# The page may load nothing, whatever a name in it says.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class _Cell(NamedTuple):
    """A cell of a table: what it shows, the value it is ordered by (none: last), its class."""

    html: str
    value: Any = None
    kind: str = ""


def render_page(compared: Compared, charts: Sequence[Chart], pictures: Pictures) -> str:
    """The page of a comparison; every text in it is escaped, whatever runs and classes are called."""
    found = compared.comparison
    names = [escape(side["name"]) for side in found.sides]
    pair = found.evaluated["pair"] if found.evaluated else ["they"]
    thresholds = [chart for chart in charts if chart.metric.startswith("threshold/")]
    curves = [chart for chart in charts if chart not in thresholds]
    absent = '<p class="muted">MLflow has no such points of these runs, or was not reached.</p>'
    title = ' <span class="vs">and</span> '.join(names) if len(names) < 4 else f"{len(names)} runs side by side"
    made = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    body = [
        f'<header><h1>{title}</h1><p class="muted">{_measured_by(found)}</p></header>',
        _section("verdict", "Verdict", _verdicts(found)),
        _section("sides", "What is compared", _sides(found)),
        _section("settings", "Settings that differ", _config(found)),
        _section("metrics", "Metrics", _metrics(found)),
        _section("classes", "Classes", _classes(found)),
        _section("curves", "Curves", _charts(found, curves) if curves else absent),
        _section("thresholds", "Thresholds", _charts(found, thresholds) if thresholds else absent),
        _section("confusion", "Confusion", _confusion(compared)),
        _section("images", f"Images on which {' and '.join(pair)} differ most", _pictures(found, pictures)),
        _section("meanings", "What the numbers mean", _meanings()),
        f'<footer class="muted small">cosa-ray {escape(__version__)}, {made}</footer>',
    ]
    if found.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
        body.insert(2, _section("notes", "Notes", f'<ul class="notes">{notes}</ul>'))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{' and '.join(names)}</title>"
        '<link rel="icon" href="data:,">'
        f"<style>{(_HERE / 'page.css').read_text(encoding='utf-8')}</style></head>\n<body><main>"
        + "\n".join(body)
        + f"</main>\n<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script></body></html>\n"
    )


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{content}</section>'


def _table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[_Cell]], name: str) -> str:
    """A table whose columns can be ordered; heads: (HTML, class)."""
    head = "".join(
        f'<th scope="col" class="{kind}" aria-sort="none"><button type="button">{text}</button></th>'
        for text, kind in heads
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="{cell.kind}" data-v="{"" if cell.value is None else escape(str(cell.value))}">{cell.html}</td>'
            for cell in row
        )
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table class="sortable" aria-label="{escape(name)}"><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _name(name: str, separator: str) -> _Cell:
    """A dotted or slashed name, which may break after its parts."""
    return _Cell(f"<code>{escape(name).replace(separator, separator + '<wbr>')}</code>", name, "left code")


def _measured_by(found: Comparison) -> str:
    used = found.evaluated
    if used is None:
        return "by the runs' own checkpoints"
    protocol = f"protocol {used['protocol']}" if used["protocol"] else "the runs' own protocol"
    images = "" if used["images"] is None else f"{used['images']:,} images of "
    return escape(f"{used['prefix']}/{used['metric']}: {protocol}, {images}split {used['split']}, {used['dataset']}")


def _badge(letter: str) -> str:
    return f'<span class="badge {look(letter)}">{letter}</span>'


def _verdicts(found: Comparison) -> str:
    if not found.verdicts:
        return '<p class="muted">The sides have no metric in common to judge by.</p>'
    intervals = [verdict.interval for verdict in found.verdicts if verdict.interval is not None]
    reach = 1.15 * max((abs(end) for bounds in intervals for end in bounds), default=0.0)
    parts = []
    for verdict in found.verdicts:
        better = verdict.difference > 0
        call, kind = {
            None: ("no interval", "noise"),
            True: ("within noise", "noise"),
            False: ("higher" if better else "lower", "better" if better else "worse"),
        }[verdict.within_noise]
        bar = "" if verdict.interval is None else interval_bar(verdict.difference, verdict.interval, reach)
        parts.append(
            f'<div class="verdict"><div><div>{_badge(verdict.letter)} '
            f'<span class="figure">{verdict.difference:+.4f}</span><span class="call {kind}">{call}</span></div>'
            f"<p>{escape(verdict.sentence)}</p></div>{bar}</div>"
        )
    return "".join(parts)


def _sides(found: Comparison) -> str:
    heads = [("", "left"), ("name", "left"), ("kind", "left"), ("runs", ""), ("steps", "")]
    heads += [("evaluated at", ""), ("cost a run", ""), ("wall time a run", "")]
    rows = []
    for place, side in enumerate(found.sides):
        places = "".join(f'<br><code class="muted small">{escape(run["folder"])}</code>' for run in side["runs"])
        at = sorted(set(found.evaluated["steps"][place])) if found.evaluated else []
        kind = f'{escape(side["kind"])}<br><span class="muted small">{escape(side["note"])}</span>'
        rows.append(
            [
                _Cell(_badge(side["letter"]), side["letter"], "left"),
                _Cell(f"{escape(side['name'])}{places}", side["name"], "left wrap name"),
                _Cell(kind if side["note"] else escape(side["kind"]), side["kind"], "left"),
                _Cell(str(len(side["runs"])), len(side["runs"])),
                _Cell(steps(side), max(run["step"] for run in side["runs"])),
                _Cell(", ".join(f"{step:,}" for step in at) or "-", at[0] if at else None),
                _Cell(escape(cost(side)), mean(side, "hours")),
                _Cell(duration(side), mean(side, "wall_seconds")),
            ]
        )
    return _table(heads, rows, "what is compared")


def _config(found: Comparison) -> str:
    if not found.config:
        return '<p class="muted">None: the configs are the same but for where runs lie and are tracked.</p>'

    def cell(value: Any, text: str) -> _Cell:
        plain = isinstance(value, int | float) and not isinstance(value, bool)
        return _Cell(f'<span class="mono">{escape(text)}</span>', value if plain else text, "left wrap")

    rows = [[_name(row["key"], "."), *map(cell, row["values"], settings(row["values"]))] for row in found.config]
    heads = [("setting", "left"), *((_badge(side["letter"]), "left") for side in found.sides)]
    return _table(heads, rows, "settings that differ")


def _against(found: Comparison) -> list[tuple[str, str]]:
    """Heads of a value for every side, and of the difference for all but the first."""
    first, *rest = [side["letter"] for side in found.sides]
    return [(_badge(first), ""), *(head for each in rest for head in ((_badge(each), ""), (f"{each} − {first}", "")))]


def _metrics(found: Comparison) -> str:
    def cells(row: MetricRow) -> list[_Cell]:
        made = [
            _name(row.name, "/"),
            _Cell(escape(row.source), row.source, "left"),
        ]
        for place, value in enumerate(row.values):
            spread = row.deviations[place]
            more = "" if spread is None else f' <span class="muted small">± {spread:.4f} (n {row.counts[place]})</span>'
            made.append(_Cell(number(value) + more, value))
            if place:
                bounds = row.intervals[place]
                more = "" if bounds is None else f' <span class="muted small">({interval(bounds)})</span>'
                made.append(_Cell(number(row.differences[place], sign=True) + more, row.differences[place]))
        return made

    heads = [("metric", "left"), ("of", "left"), *_against(found)]
    shared = [cells(row) for row in found.metrics if row.is_shared]
    alone = [cells(row) for row in found.metrics if not row.is_shared]
    shown = _table(heads, shared, "metrics") if shared else '<p class="muted">None that two have.</p>'
    if alone:
        shown += f"<details><summary>{len(alone)} that only one has</summary>{_table(heads, alone, 'of one')}</details>"
    return shown


def _classes(found: Comparison) -> str:
    if not found.per_class:
        return '<p class="muted">No evaluations in common have classes to compare.</p>'
    known = [abs(value) for row in found.per_class for value in row["differences"] if value is not None]
    reach = max(known, default=0.0) or 1.0
    rows = []
    for row in found.per_class:
        cells = [_Cell(escape(row["class"]), row["class"], "left"), _Cell(number(row["values"][0]), row["values"][0])]
        for value, difference in zip(row["values"][1:], row["differences"][1:], strict=True):
            cells.append(_Cell(number(value), value))
            cells.append(_Cell(number(difference, sign=True) + _bar(difference, reach), difference))
        rows.append([*cells, _Cell(number(row["pixels"]), row["pixels"])])
    heads = [("class", "left"), *_against(found), ("true pixels", "")]
    return f'<p class="muted">IoU of {escape(found.classes_of)}</p>' + _table(heads, rows, "IoU per class")


def _bar(difference: float | None, reach: float) -> str:
    if difference is None:
        return ""
    width = 50 * abs(difference) / reach
    left, kind = (50 - width, "down") if difference < 0 else (50, "up")
    return f'<span class="bar"><i class="{kind}" style="left:{left:.1f}%;width:{width:.1f}%"></i></span>'


def _charts(found: Comparison, charts: Sequence[Chart]) -> str:
    legend = "".join(f"<li>{_badge(side['letter'])} {escape(side['name'])}</li>" for side in found.sides)
    drawn = "".join(curve(chart) for chart in charts)
    return f'<ul class="legend">{legend}</ul><div class="charts">{drawn}</div>'


def _confusion(compared: Compared) -> str:
    difference = confusion_difference(compared)
    if difference is None:
        return '<p class="muted">No confusion matrices in common.</p>'
    assert compared.comparison.evaluated is not None
    first, second = compared.comparison.evaluated["pair"]
    said = (
        f"{second} − {first}: by how many points the share of a true class's pixels (row) that is given a label "
        "(column) differs. Green helps (more on the diagonal, fewer beside it), red harms."
    )
    return f'<p class="muted">{said}</p><div class="scroll">{confusion_map(*difference)}</div>'


def _pictures(found: Comparison, pictures: Pictures) -> str:
    if not pictures.rows:
        return f'<p class="muted">{escape(pictures.note)}</p>'
    assert found.evaluated is not None
    first, second = (side for side in found.sides if side["letter"] in found.evaluated["pair"])
    captions = ["image", "truth", *(f"{side['letter']}, {side['name']}" for side in (first, second))]
    legend = "".join(
        f'<li><span class="swatch" style="background:{colour}"></span>{escape(name)}</li>'
        for name, colour in pictures.legend
    )
    parts = [f'<p class="muted">{escape(pictures.note)}</p><ul class="legend">{legend}</ul>']
    for row in pictures.rows:
        cells = "".join(
            f'<figure><img src="{uri}" alt="{escape(f"{row.id}: {caption}")}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
            for uri, caption in zip(row.pictures, captions, strict=True)
        )
        a, b = row.values
        parts.append(
            f'<div class="pair"><h3>{escape(row.id)} <span class="muted">{first["letter"]} {a:.3f}, '
            f'{second["letter"]} {b:.3f} ({row.difference:+.3f})</span></h3><div class="cells">{cells}</div></div>'
        )
    return "".join(parts)


def _meanings() -> str:
    entries = {
        "difference": "A side's value less A's.",
        "95 % interval": "Paired percentile bootstrap over images: 1,000 times, as many images are drawn with "
        "replacement, the same for all sides, and the difference of their mIoUs is taken. It says how much the "
        "difference depends on which images are in the split. It says nothing about seeds.",
        "within noise": "The interval holds 0: with other images of the same kind the difference could be nothing, or "
        "the other way round. Or, of two groups of seeds, the 95 % interval over seeds holds it.",
        "interval over seeds": "Welch's, of two groups' means: of two seeds each it is wide, as it has to be.",
        "± and n": "Standard deviation over the runs of a group that differ in their seed only, and how many they are.",
        "cost": "Wall time of the workers times their GPUs, or CPU threads, up to the last checkpoint; the mean over a "
        "side's runs. Of a sweep it is that of the best trial alone.",
        "wall time": "From the start of the run in MLflow to its end, pauses included.",
    }
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in entries.items()) + "</dl>"
