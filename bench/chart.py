"""The bars of a report: a panel for each workload, grouped by precision."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from report import grouped, is_gptx

_PANELS = (
    ("prefill_tokens_per_second", 1, "Prefill, {prefill} tokens", "tokens/s"),
    ("decode_tokens_per_second", 1, "Decode, one sequence", "tokens/s"),
    ("batch_tokens_per_second", 1, "Decode, {sequences} ragged sequences", "tokens/s"),
    ("first_token_seconds", 1e3, "First token after {decode}", "ms, less is better"),
)
_OURS, _PEER, _QUIET = "#c2410c", "#94a3b8", "#475569"
_GAP = 0.8  # between precisions, in bars
_STYLE = {"svg.fonttype": "none", "svg.hashsalt": "gptx", "font.size": 9}


def draw(report: dict[str, Any], path: Path) -> list[Path]:
    """Writes ``path`` as PNG and as SVG and returns both.

    Raises:
        ValueError: nothing was measured.
    """
    groups = grouped(report["variants"])
    if not groups:
        raise ValueError("--chart: expected at least one measured variant, got none")
    bars, headings = _places(groups)
    workload = report["workload"]
    sizes = {
        "prefill": len(workload["prefill"]),
        "decode": len(workload["decode"]),
        "sequences": len(workload["batch"]),
    }
    with mpl.rc_context(_STYLE):
        height = 1.2 + 0.24 * (len(bars) + (1 + _GAP) * len(groups))
        figure = Figure(figsize=(14, height), layout="constrained")
        axes = figure.subplots(1, len(_PANELS), sharey=True)
        for axis, (name, scale, title, unit) in zip(axes, _PANELS, strict=True):
            _panel(axis, report["variants"], bars, name, scale)
            axis.set_title(title.format(**sizes), fontsize=10, loc="left", fontweight="bold")
            axis.set_xlabel(unit, color=_QUIET)
        axes[0].set_yticks([*bars.values()], [key.replace(":", " ") for key in bars])
        axes[0].invert_yaxis()
        for key, label in zip(bars, axes[0].get_yticklabels(), strict=True):
            label.set_color(_OURS if is_gptx(key) else "black")
        for precision, place in headings.items():
            axes[0].text(
                *(-0.02, place, precision),
                transform=axes[0].get_yaxis_transform(),
                ha="right",
                va="center",
                fontweight="bold",
            )
        figure.suptitle(_title(report), fontsize=9, color=_QUIET, x=0.01, ha="left")
        paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
        for each in paths:
            metadata = {"Date": None} if each.suffix == ".svg" else None
            figure.savefig(each, dpi=160, metadata=metadata)
    return paths


def _places(groups: dict[str, dict[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Where the bar of each variant and the heading of each precision stand, downwards."""
    bars, headings = {}, {}
    place = 0.0
    for precision, group in groups.items():
        headings[precision] = place
        for key in group:
            place += 1
            bars[key] = place
        place += 1 + _GAP
    return bars, headings


def _panel(
    axis: Any, results: dict[str, Any], bars: dict[str, float], name: str, scale: float
) -> None:
    """Bars of the medians, a line from the least to the most, the median as a number."""
    spreads = [results[key]["figures"][name] for key in bars]
    places = [*bars.values()]
    medians = [spread["median"] * scale for spread in spreads]
    colors = [_OURS if is_gptx(key) else _PEER for key in bars]
    axis.barh(places, medians, height=0.72, color=colors)
    for place, spread in zip(places, spreads, strict=True):
        ends = [spread["low"] * scale, spread["high"] * scale]
        axis.plot(ends, [place, place], color=_QUIET, linewidth=0.8)
    most = max(spread["high"] * scale for spread in spreads)
    for place, median, spread in zip(places, medians, spreads, strict=True):
        end = max(median, spread["high"] * scale)
        text = f"{median:.1f}" if median < 100 else f"{median:.0f}"
        axis.text(end + 0.015 * most, place, text, va="center", fontsize=8, color=_QUIET)
    axis.set_xlim(0, 1.16 * most)
    axis.locator_params(axis="x", nbins=4)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(left=False, colors=_QUIET)


def _title(report: dict[str, Any]) -> str:
    settings, machine = report["settings"], report["machine"]
    return (
        f"{settings['name']}, {report['parameters'] / 1e6:.0f}M parameters, "
        f"{settings['threads']} threads of {machine['cpu']} ({machine['isas'][0]}), "
        f"gptx {report['versions']['commit']}, {report['time'][:10]}; "
        "median and range"
    )
