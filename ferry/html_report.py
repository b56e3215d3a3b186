"""One migration as a page of HTML that needs nothing else: no script, no style or picture from
elsewhere. It is made from the event lines of `send --json`.

Owns the page. Everything that comes from a file is escaped.
"""

import json
import time
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ferry.errors import ConfigError
from ferry.findings import methods_text
from ferry.progress import bytes_text, seconds_text
from sync.handover.states import HandoverState

Event = dict[str, Any]

WIDTH, HEIGHT, MARGIN = 900, 180, 56
TOP = 16
"""Above a drawing: room for the names of phases."""
CHARACTER = 7
"""More than the mean width of one, in the units of a drawing."""
COLORS = (
    *("#3465a4", "#73a946", "#c4622d", "#8a5aa8", "#b8952b", "#2f8f8f", "#a8405c", "#6b7280"),
    *("#7fb2e5", "#2f6b2f", "#e5a57f", "#c79be0", "#5c4a12"),
)
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 960px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; font-variant-numeric: tabular-nums }
th, td { padding: .2em .8em; text-align: right; border-bottom: 1px solid #ddd }
th:first-child, td:first-child, .words th, .words td { text-align: left }
td i { display: inline-block; width: .8em; height: .8em; margin-right: .6em; border-radius: 2px }
dl { display: flex; flex-wrap: wrap; gap: 1em 2.5em; margin: 1.2em 0 }
dt { color: #666; font-size: 13px }
dd { margin: 0; font-size: 22px; font-variant-numeric: tabular-nums }
svg { width: 100%; height: auto; margin: .5em 0; font: 11px system-ui, sans-serif }
.wrong { color: #a40000; font-weight: 600 }
"""


def read_events(path: str) -> list[Event]:
    """The events of the last migration in the file, whose last line may have been cut off. Raises
    `ConfigError` where it has none of a migration."""
    events: list[Event] = []
    try:
        *whole, rest = Path(path).read_text(encoding="utf-8").split("\n")
        for line in (*whole, *([rest] if rest.endswith("}") else [])):
            found = json.loads(line)
            if isinstance(found, dict) and found.get("role") == "send":
                if found.get("phase") == HandoverState.PREPARING.value:
                    events.clear()
                events.append(found)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError(f"{path} holds no events: {error}") from error
    if not any(each.get("event") == "phase" for each in events):
        raise ConfigError(f"{path} has no migration in it: is it of `send --json`?")
    return events


def page(events: Sequence[Event]) -> str:
    """The page. What a migration did not come to is left out."""
    of: dict[str, list[Event]] = {}
    for each in events:
        of.setdefault(str(each["event"]), []).append(each)
    report = of.get("report", [{}])[-1]
    rounds = of.get("round", [])
    began = float(events[0]["time"])
    title = f"Migration {report['session']}" if report else "A migration that did not succeed"
    parts = [f"<h1>{escape(title)}</h1>", _outcome(of, began)]
    marks = [(float(each["time"]) - began, str(each["phase"])) for each in of["phase"]]
    if report:
        parts.append(_figures(report))
    if rounds:
        times = [float(each["time"]) - began for each in rounds]
        pages = [
            ("dirty at its beginning", [each["dirty_pages"] for each in rounds]),
            ("left behind it", [each["remaining_pages"] for each in rounds]),
        ]
        rates = [
            ("sent", [each["throughput_bytes_per_s"] / (1 << 20) for each in rounds]),
            ("dirtied", [_scaled(each["dirty_pages_per_s"], 1 / 256) for each in rounds]),
        ]
        parts += ["<h2>Rounds: pages</h2>", chart(times, pages, marks)]
        parts += ["<h2>Rounds: MiB/s</h2>", chart(times, rates, marks)]
    if progress := of.get("progress", []):
        times = [float(each["time"]) - began for each in progress]
        left = [
            ("left of it", [each["remaining_bytes"] / (1 << 20) for each in progress]),
            ("moved a second", [each["throughput_bytes_per_s"] / (1 << 20) for each in progress]),
        ]
        parts += ["<h2>All of the guest: MiB</h2>", chart(times, left, marks)]
    if report:
        parts += ["<h2>Downtime</h2>", _downtime(report)]
        parts += ["<h2>Devices</h2>", _devices(report)]
        parts += ["<h2>On the wire</h2>", _table(("what", "bytes"), _wire(report))]
    if rounds:
        keys = ("round", "dirty_pages", "sent_pages", "zero", "same", "delta", "copy", "lz4", "raw")
        rows = [
            [*(str(each[key]) for key in keys), bytes_text(each["wire_bytes"])] for each in rounds
        ]
        head = [key.replace("_", " ") for key in (*keys, "wire")]
        parts += ["<h2>Every round</h2>", _table(head, rows)]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}'
        f"</title><style>{STYLE}</style></head>\n<body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _outcome(of: dict[str, list[Event]], began: float) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(began))
    lines = [f"<p>Begun {when}.</p>"]
    for each in of.get("success", []):
        bad = each.get("downtime_over_limit") or each.get("devices") == "silent"
        wrong = ' class="wrong"' if bad else ""
        lines.append(f"<p{wrong}>{escape(str(each['text']))}</p>")
    for each in of.get("error", []):
        lines.append(f'<p class="wrong">{escape(str(each["message"]))}</p>')
    return "\n".join(lines)


def _figures(report: Event) -> str:
    """What is asked for first."""
    limit = report.get("downtime_limit_ms")
    allowed = f" of {limit:.0f}" if limit else ""
    figures = {
        "took": seconds_text(report["duration_s"]),
        "downtime": f"{report['downtime_total_ms']:.0f}{allowed} ms",
        "on the wire": bytes_text(sum(report["wire_bytes"].values())),
        "devices": str(len(report["methods"])),
    }
    told = "".join(f"<div><dt>{name}</dt><dd>{escape(v)}</dd></div>" for name, v in figures.items())
    return f"<dl>{told}</dl>"


def chart(
    times: Sequence[float],
    series: Iterable[tuple[str, Sequence[float | None]]],
    marks: Sequence[tuple[float, str]],
) -> str:
    """Lines over the time in seconds, with a mark where each phase begins. A value of None is not
    known, and left out."""
    series = list(series)
    last = max([*times, *(at for at, _ in marks)]) or 1.0
    top = max((value for _, values in series for value in values if value), default=1.0) or 1.0
    inner_width, inner_height = WIDTH - 2 * MARGIN, HEIGHT - MARGIN

    def at(moment: float, value: float) -> str:
        x = MARGIN + moment / last * inner_width
        return f"{x:.1f},{TOP + inner_height * (1 - value / top):.1f}"

    base = TOP + inner_height
    drawn = [
        f'<text x="{MARGIN}" y="{base + 14}">0</text>',
        f'<text x="{WIDTH - MARGIN}" y="{base + 14}" text-anchor="end">{last:.1f} s</text>',
    ]
    for part in (0, 0.5, 1):
        y = TOP + inner_height * (1 - part)
        drawn += [
            f'<line x1="{MARGIN}" y1="{y}" x2="{WIDTH - MARGIN}" y2="{y}" '
            f'stroke="{"#e4e4e4" if part else "#888"}"/>',
            f'<text x="{MARGIN - 6}" y="{y + 4}" text-anchor="end">{top * part:.4g}</text>',
        ]
    ends = [*(moment for moment, _ in marks[1:]), last]
    for (moment, phase), end in zip(marks, ends, strict=False):
        x = MARGIN + moment / last * inner_width
        if (end - moment) / last * inner_width > CHARACTER * len(phase):
            drawn.append(f'<text x="{x + 3:.1f}" y="{TOP - 4}" fill="#777">{escape(phase)}</text>')
        drawn.append(
            f'<line x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{base}" stroke="#ccc">'
            f"<title>{escape(phase)}: {moment:.2f} s</title></line>"
        )
    for number, (name, values) in enumerate(series):
        color = COLORS[number % len(COLORS)]
        points = [at(t, v) for t, v in zip(times, values, strict=True) if v is not None]
        line = " ".join(points)
        drawn.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        drawn += [
            f'<circle cx="{x}" cy="{y}" r="2" fill="{color}"/>'
            for x, y in (point.split(",") for point in points)
        ]
        drawn.append(
            f'<text x="{MARGIN + 160 * number}" y="{HEIGHT - 8}" fill="{color}">'
            f"{escape(name)}</text>"
        )
    return _svg(HEIGHT, drawn)


def _svg(height: int, drawn: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img">\n' + "\n".join(drawn) + "\n</svg>"


def _downtime(report: Event) -> str:
    phases: dict[str, float] = report["downtime_ms"]
    total, limit = float(report["downtime_total_ms"]), report.get("downtime_limit_ms")
    longest = max(total, float(limit or 0.0)) or 1.0
    scale = (WIDTH - 2 * MARGIN) / longest
    drawn, x = [], float(MARGIN)
    for number, (phase, ms) in enumerate(phases.items()):
        drawn.append(
            f'<rect x="{x:.1f}" y="14" width="{ms * scale:.1f}" height="30" '
            f'fill="{COLORS[number % len(COLORS)]}"><title>{escape(phase)} {ms:.1f} ms</title>'
            "</rect>"
        )
        x += ms * scale
    if limit:
        x = MARGIN + float(limit) * scale
        drawn.append(
            f'<line x1="{x:.1f}" y1="6" x2="{x:.1f}" y2="52" stroke="#a40000" stroke-width="2"/>'
        )
        drawn.append(
            f'<text x="{x:.1f}" y="66" fill="#a40000" text-anchor="end">limit {limit:.0f} ms</text>'
        )
    told = f"<p>{total:.1f} ms, of which the VMM's {report['downtime_vmm_ms']:.1f} ms.</p>"
    rows = [(phase.replace("_", " "), f"{ms:.1f}") for phase, ms in phases.items()]
    colors = [COLORS[number % len(COLORS)] for number in range(len(rows))]
    return told + _svg(72, drawn) + _table(("phase", "ms"), rows, colors)


def _devices(report: Event) -> str:
    counts = report["registers"] or [{}] * len(report["methods"])
    rows = []
    for number, (method, registers) in enumerate(zip(report["methods"], counts, strict=False)):
        told = "; ".join(
            f"{name.replace('_', ' ')} {value}"
            for name, value in registers.items()
            if isinstance(value, int)
        )
        how = methods_text(method.get("registers", "?"), method.get("dirty", "?"))
        rows.append((str(number), how, told))
    return _table(("device", "moved", "registers"), rows, kind="words")


def _wire(report: Event) -> list[tuple[str, str]]:
    return [(what.replace("_", " "), bytes_text(n)) for what, n in report["wire_bytes"].items()]


def _table(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    colors: Sequence[str] = (),
    kind: str = "numbers",
) -> str:
    """A table of `numbers` or `words`; `colors` are those of its rows in a drawing."""

    def row(cells: Sequence[str], tag: str, color: str = "") -> str:
        swatch = f'<i style="background: {color}"></i>' if color else ""
        inner = "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells)
        return f"<tr>{inner.replace(f'<{tag}>', f'<{tag}>{swatch}', 1)}</tr>"

    shades = [*colors, *[""] * (len(rows) - len(colors))]
    lines = "\n".join(row(cells, "td", color) for cells, color in zip(rows, shades, strict=True))
    return f'<table class="{kind}">\n{row(head, "th")}\n{lines}\n</table>'
