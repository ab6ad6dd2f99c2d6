"""The validation report: one HTML file that needs nothing else, light and dark."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from manyeyes.data.quarantine import QuarantinedSample
from manyeyes.data.records import Record
from manyeyes.data.shards import RecordReader
from manyeyes.data.snapshot import Snapshot
from manyeyes.errors import RecordError
from manyeyes.runtime.preprocess import decode_image

if TYPE_CHECKING:
    from manyeyes.data.validation import ValidationReport

_NUM_SHOWN = 8
_NUM_BAD_SHOWN = 24
_NUM_PAIRS = 4
_THUMBNAIL = 160
_NUM_BARS = 16

_STYLE = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #ffffff; --ink: #1b2430; --soft: #5b6776; --line: #dfe4ea;
  --good: #1a7f4b; --bad: #c0362c; --warn: #9a6700; --bar: #3b6fd4; --tint: #eef2f8; }
@media (prefers-color-scheme: dark) { :root { --page: #12161c; --card: #1a2029; --ink: #e6eaf0; --soft: #9aa7b6;
  --line: #2c3541; --good: #4cc38a; --bad: #ff7b72; --warn: #e3b341; --bar: #7aa5f7; --tint: #222b37; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, -apple-system, "Segoe UI",
  Roboto, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 26px; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 18px; margin: 40px 0 12px; }
p { margin: 0 0 12px; max-width: 75ch; }
.soft { color: var(--soft); }
code { font: 13px/1.4 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere; }
.verdict { display: inline-block; padding: 2px 12px; border-radius: 999px; font-weight: 600; color: var(--card); }
.verdict.passed { background: var(--good); } .verdict.failed { background: var(--bad); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 12px; margin: 24px 0 0; }
.figure, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 14px 16px; }
.figure b { display: block; font-size: 24px; font-weight: 650; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: 9px 14px; border-bottom: 1px solid var(--line); }
tr:last-child td { border-bottom: 0; }
th { font-weight: 600; color: var(--soft); font-size: 13px; white-space: nowrap; }
td.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.good { color: var(--good); } .bad { color: var(--bad); } .warn { color: var(--warn); }
.state { font-weight: 600; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(380px, 1fr)); gap: 12px; }
@media (max-width: 450px) { .charts { grid-template-columns: 1fr; } }
.charts h3 { font-size: 14px; margin: 0 0 8px; } svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; } svg rect { fill: var(--bar); }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px; }
.sample img { display: block; width: 128px; height: 128px; object-fit: contain; image-rendering: pixelated;
  background: var(--tint); border-radius: 6px; margin-bottom: 10px; }
.sample p { margin: 6px 0 0; overflow-wrap: anywhere; } .sample dl { margin: 8px 0 0; }
.sample dt { color: var(--soft); } .sample dd { margin: 0 0 6px; font-weight: 600; }
@media (max-width: 600px) { main { padding: 20px 12px 40px; }
  tr:has(th) { display: none; } td[data-label]::before { content: attr(data-label) ": "; color: var(--soft); }
  tr { display: block; padding: 10px 14px; border-bottom: 1px solid var(--line); }
  td, td.number { display: block; text-align: left; padding: 2px 0; border: 0; } }
"""


def render_report(
    report: ValidationReport,
    *,
    profile: pd.DataFrame,
    quarantine: Sequence[QuarantinedSample],
    snapshot: Snapshot,
) -> str:
    """Render the report.

    Args:
        report: What was found.
        profile: The profile that it is about.
        quarantine: The samples that cannot be used.
        snapshot: Where the images are.

    Returns:
        A whole HTML document; images and styles are inside.
    """
    sections = [
        _head(report),
        _expectations(report),
        _quarantine(report, quarantine, profile=profile, snapshot=snapshot),
        _distributions(profile),
        _samples(profile, snapshot=snapshot),
        _data_sets(report, snapshot=snapshot),
    ]
    return render_page(f"Data validation: {report.verdict}", "\n".join(sections))


def render_page(title: str, body: str) -> str:
    """The frame of a page about data.

    Args:
        title: Plain text.
        body: HTML.

    Returns:
        A whole HTML document with its style inside.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><main>\n{body}\n</main></body></html>\n"
    )


def _head(report: ValidationReport) -> str:
    failures = report.failures()
    if failures:
        names = ", ".join(escape(failure.name) for failure in failures)
        sentence = (
            f"The snapshot is not fit to train on. Critical and not met: <b>{names}</b>. Fix the data, then "
            "build, add and push the snapshot again."
        )
    elif report.quarantined:
        sentence = "The snapshot is fit to train on. The samples in quarantine are left out."
    else:
        sentence = "The snapshot is fit to train on. No sample had to be left out."
    met = sum(outcome.success for outcome in report.expectations)
    figures = [
        (f"{report.rows:,}", "samples looked at"),
        (f"{report.quarantined:,}", "in quarantine"),
        (f"{report.contaminated_images:,}", "images also in an evaluation set"),
        (f"{met} of {len(report.expectations)}", "expectations met"),
    ]
    cards = "".join(
        f'<div class="figure"><b>{value}</b><span class="soft">{label}</span></div>' for value, label in figures
    )
    return (
        f'<h1>Data validation <span class="verdict {report.verdict}">{report.verdict}</span></h1>'
        f'<p class="soft">Snapshot <code>{report.data_md5}</code>, suite <code>{escape(report.suite)}</code></p>'
        f"<p>{sentence}</p>"
        f'<div class="figures">{cards}</div>'
    )


def _expectations(report: ValidationReport) -> str:
    rows = []
    for outcome in report.expectations:
        colour = "good" if outcome.success else {"critical": "bad"}.get(outcome.severity, "warn")
        state = "✓ met" if outcome.success else "✗ not met"
        examples = ", ".join(f"<code>{escape(example)}</code>" for example in outcome.examples)
        against = f"{outcome.unexpected_count:,}" + (
            f" <span class='soft'>({outcome.unexpected_percent:.2f}%)</span>" if outcome.unexpected_count else ""
        )
        rows.append(
            f'<tr><td class="state {colour}">{state}</td><td><b>{escape(outcome.name)}</b><br>'
            f'<span class="soft">{escape(outcome.explanation)}</span>'
            f"{f'<br>For instance {examples}' if examples else ''}</td>"
            f'<td data-label="severity">{outcome.severity}</td>'
            f'<td class="number" data-label="samples against it">{against}</td></tr>'
        )
    return (
        "<h2>What was expected</h2>"
        '<p class="soft">Only critical expectations decide the verdict; the others are for you to judge.</p>'
        '<div class="scroll"><table><tr><th></th><th>expectation</th><th>severity</th><th>samples against it</th></tr>'
        f"{''.join(rows)}</table></div>"
    )


def _quarantine(
    report: ValidationReport,
    quarantine: Sequence[QuarantinedSample],
    *,
    profile: pd.DataFrame,
    snapshot: Snapshot,
) -> str:
    if not quarantine:
        return "<h2>Quarantine</h2><p>Empty: every sample can be used.</p>"
    shown = quarantine[:_NUM_BAD_SHOWN]
    more = "" if len(shown) == len(quarantine) else f" The first {len(shown)} are shown."
    bad = profile[profile["problem"] != ""].head(len(shown))
    cards = []
    for sample, record in zip(shown, _read_rows(bad, snapshot=snapshot), strict=True):
        image = "" if record is None else _image_tag(record)
        cards.append(
            f'<div class="card sample">{image}<code>{escape(sample.id)}</code> '
            f'<span class="soft">{escape(sample.dataset)}</span><p class="bad">{escape(sample.reason)}</p></div>'
        )
    return (
        f"<h2>Quarantine</h2><p>{report.quarantined:,} samples cannot be used and are left out of training; "
        f"<code>quarantine.jsonl</code> lists all of them.{more}</p>"
        f'<div class="samples">{"".join(cards)}</div>'
    )


def _distributions(profile: pd.DataFrame) -> str:
    if profile.empty:
        return ""
    sizes = (profile["width"].astype(str) + " x " + profile["height"].astype(str)).where(
        profile["n_images"] > 0, "text only"
    )
    charts = [
        ("Samples by data set", _bars(profile["dataset"].value_counts().head(_NUM_BARS).to_dict())),
        ("Image size in pixels (first image)", _bars(sizes.value_counts().head(_NUM_BARS).to_dict())),
        ("Question-answer pairs a sample", _histogram(profile["n_turns"] // 2)),
        ("Characters a sample", _histogram(profile["text_chars"])),
    ]
    if (profile["n_tokens"] >= 0).any():
        charts.append(("Tokens a sample", _histogram(profile["n_tokens"])))
    cards = "".join(f'<div class="card"><h3>{title}</h3>{chart}</div>' for title, chart in charts)
    return f'<h2>What the data looks like</h2><div class="charts">{cards}</div>'


def _bars(counts: Mapping[object, int]) -> str:
    """Horizontal bars, longest first."""
    top = max(counts.values())
    rows = []
    for index, (label, count) in enumerate(counts.items()):
        y = 24 * index
        rows.append(
            f'<text x="0" y="{y + 14}">{escape(str(label))}</text>'
            f'<rect x="120" y="{y + 3}" width="{150 * count / top:.1f}" height="15" rx="3"/>'
            f'<text x="{126 + 150 * count / top:.1f}" y="{y + 14}">{count:,}</text>'
        )
    return f'<svg viewBox="0 0 330 {24 * len(counts)}" role="img">{"".join(rows)}</svg>'


def _histogram(values: pd.Series) -> str:
    """Upright bars over equal bins, with the range and the median written below."""
    low, high = int(values.min()), int(values.max())
    # Whole numbers: every bin is as many of them wide, so none looks fuller than it is.
    bin_width = -(-(high - low + 1) // _NUM_BARS)
    counts, _ = np.histogram(values, bins=np.arange(low, high + bin_width + 1, bin_width))
    width = 330 / len(counts)
    bars = "".join(
        f'<rect x="{index * width + 1:.1f}" y="{100 - 96 * count / counts.max():.1f}" width="{width - 2:.1f}" '
        f'height="{96 * count / counts.max():.1f}" rx="2"/>'
        for index, count in enumerate(counts)
    )
    return (
        f'<svg viewBox="0 0 330 118" role="img">{bars}<text x="0" y="115">{low:,}</text>'
        f'<text x="165" y="115" text-anchor="middle">median {values.median():,.0f}</text>'
        f'<text x="330" y="115" text-anchor="end">{high:,}</text></svg>'
    )


def _samples(profile: pd.DataFrame, *, snapshot: Snapshot) -> str:
    usable = profile[(profile["problem"] == "") & ~profile["is_eval"]]
    if usable.empty:
        return ""
    rows = usable.iloc[np.unique(np.linspace(0, len(usable) - 1, _NUM_SHOWN).astype(int))]
    cards = []
    for record in _read_rows(rows, snapshot=snapshot):
        if record is None:
            continue
        turns = record.turns[: 2 * _NUM_PAIRS]
        pairs = "".join(
            f"<dt>{escape(turn.text.strip())}</dt>" if turn.speaker == "human" else f"<dd>{escape(turn.text)}</dd>"
            for turn in turns
        )
        num_more = len(record.turns) // 2 - len(turns) // 2
        more = f"and {num_more} more question{'' if num_more == 1 else 's'}" if num_more else ""
        cards.append(
            f'<div class="card sample">{_image_tag(record)}<code>{escape(record.id)}</code><dl>{pairs}</dl>'
            f'<span class="soft">{more}</span></div>'
        )
    return (
        '<h2>A few training samples</h2><p class="soft">Evenly spaced over the training data.</p>'
        f'<div class="samples">{"".join(cards)}</div>'
    )


def _data_sets(report: ValidationReport, *, snapshot: Snapshot) -> str:
    rows = []
    for name, count in report.datasets.items():
        entry = snapshot.dataset(name)
        use = "evaluation" if name in report.eval_datasets else "training"
        rows.append(
            f'<tr><td><b>{escape(name)}</b></td><td>{use}</td><td class="number" data-label="samples">{count:,}</td>'
            f'<td class="number" data-label="images">{entry.images:,}</td><td>{escape(entry.licence)}</td>'
            f'<td class="soft">{escape(entry.source)}</td></tr>'
        )
    return (
        '<h2>Data sets</h2><div class="scroll"><table><tr><th>name</th><th>use</th><th>samples</th><th>images</th>'
        f"<th>licence</th><th>source</th></tr>{''.join(rows)}</table></div>"
    )


def _read_rows(rows: pd.DataFrame, *, snapshot: Snapshot) -> list[Record | None]:
    """Records of some rows of the profile; ``None`` where a record cannot be read."""
    readers: dict[str, RecordReader] = {}
    records: list[Record | None] = []
    for dataset, position in zip(rows["dataset"], rows["row"], strict=True):
        if dataset not in readers:
            readers[dataset] = RecordReader(snapshot.shards(dataset))
        try:
            records.append(readers[dataset].read(int(position)))
        except RecordError:
            records.append(None)  # its card says why it cannot be read
    return records


def _image_tag(record: Record) -> str:
    """The first image as a small PNG inside the page; nothing when there is none or it cannot be decoded."""
    if not record.images:
        return ""
    try:
        image = Image.fromarray(decode_image(record.images[0].data))
    except RecordError:
        return '<p class="soft">The image cannot be shown.</p>'
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="Image of {escape(record.id)}" src="data:image/png;base64,{encoded}">'
