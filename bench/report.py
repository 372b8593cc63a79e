"""From samples to figures, and from figures to the Markdown tables, one for each precision."""

from __future__ import annotations

from typing import Any, NamedTuple

import workloads
from gptx.config import GPTConfig
from measuring import Spread
from peers import PRECISIONS
from workloads import Storage, Workload

Round = dict[str, float]
Results = dict[str, dict[str, Any]]


def figures(
    config: GPTConfig, storage: Storage, workload: Workload, result: dict[str, Any]
) -> dict[str, Spread]:
    """What the table shows of one variant. Every figure is made within a round, then summarised."""
    rounds = result["rounds"]
    samples = [
        _prefill(config, workload, r)
        | _decode(config, storage, workload, r)
        | _batch(config, storage, workload, r)
        for r in rounds
    ]
    spreads = {name: Spread.of([sample[name] for sample in samples]) for name in samples[0]}
    spreads["load_seconds"] = Spread.of(result["load_seconds"])
    spreads["arithmetic_peak"] = Spread.of(_readings(rounds, "_peak_"))
    spreads["read_bandwidth"] = Spread.of(_readings(rounds, "_read_"))
    for name, samples_of_memory in _memory(result["memory"]).items():
        spreads[name] = Spread.of(samples_of_memory)
    return spreads


def _prefill(config: GPTConfig, workload: Workload, r: Round) -> dict[str, float]:
    tokens = len(workload.prefill)
    flops = workloads.prefill_flops(config, tokens) / r["prefill"]
    return {
        "prefill_tokens_per_second": tokens / r["prefill"],
        "prefill_flops_per_second": flops,
        "prefill_share_of_peak": flops / _around(r, "prefill_peak"),
    }


def _decode(config: GPTConfig, storage: Storage, workload: Workload, r: Round) -> dict[str, float]:
    n = workload.n_decode
    seconds = (r["decode_all"] - r["decode_first"]) / n
    context = workloads.mean_context(len(workload.decode), n)
    rate = workloads.step_bytes(config, storage, [context]) / seconds
    return {
        "first_token_seconds": r["decode_first"],
        "decode_tokens_per_second": 1 / seconds,
        "decode_bytes_per_second": rate,
        "decode_share_of_read_bandwidth": rate / _around(r, "decode_read"),
    }


def _batch(config: GPTConfig, storage: Storage, workload: Workload, r: Round) -> dict[str, float]:
    n = workload.n_decode
    seconds = (r["batch_all"] - r["batch_first"]) / n
    contexts = [workloads.mean_context(len(prompt), n) for prompt in workload.batch]
    bound = max(
        workloads.step_bytes(config, storage, contexts) / _around(r, "batch_read"),
        workloads.step_flops(config, contexts) / _around(r, "batch_peak"),
    )
    return {
        "batch_tokens_per_second": len(contexts) / seconds,
        "batch_share_of_roofline": bound / seconds,
    }


def _around(r: Round, yardstick: str) -> float:
    return (r[f"{yardstick}_before"] + r[f"{yardstick}_after"]) / 2


def _readings(rounds: list[Round], yardstick: str) -> list[float]:
    return [value for r in rounds for name, value in r.items() if yardstick in name]


def _memory(processes: list[dict[str, Any]]) -> dict[str, list[float]]:
    if not all(process["imported"] for process in processes):
        return {}
    return {
        "load_anonymous_bytes": [
            process["loaded"]["anonymous"] - process["imported"]["anonymous"]
            for process in processes
        ],
        "peak_memory_bytes": [process["used"]["peak"] for process in processes],
        "anonymous_memory_bytes": [process["used"]["anonymous"] for process in processes],
    }


class Row(NamedTuple):
    """A row of the tables.

    Attributes:
        label: may name {prefill}, {decode} and {sequences} of the workload.
        figure: its name in `figures`.
        scale, digits: how it is shown.
        better: "more" or "less"; "" where a ratio would say nothing.
    """

    label: str
    figure: str
    scale: float = 1
    digits: int = 0
    better: str = ""


ROWS = (
    Row("prefill, {prefill} tokens: tokens/s", "prefill_tokens_per_second", 1, 0, "more"),
    Row("· GOP/s", "prefill_flops_per_second", 1e-9),
    Row("· share of the arithmetic peak", "prefill_share_of_peak", 1, 2),
    Row("first token after {decode}: ms", "first_token_seconds", 1e3, 1, "less"),
    Row("decode, batch 1: tokens/s", "decode_tokens_per_second", 1, 1, "more"),
    Row("· GB/s read", "decode_bytes_per_second", 1e-9, 1),
    Row("· share of the read bandwidth", "decode_share_of_read_bandwidth", 1, 2),
    Row("decode, {sequences} ragged sequences: tokens/s", "batch_tokens_per_second", 1, 0, "more"),
    Row("· share of the roofline", "batch_share_of_roofline", 1, 2),
    Row("load, warm: ms", "load_seconds", 1e3, 0, "less"),
    Row("· memory it allocates: MB", "load_anonymous_bytes", 1e-6),
    Row("peak memory: MB", "peak_memory_bytes", 1e-6, 0, "less"),
    Row("· allocated, not mapped from the file: MB", "anonymous_memory_bytes", 1e-6, 0, "less"),
    Row("arithmetic peak beside it: GOP/s", "arithmetic_peak", 1e-9),
    Row("read bandwidth beside it: GB/s", "read_bandwidth", 1e-9, 1),
)


def tables(report: dict[str, Any]) -> str:
    """Markdown: a table for each precision, the checks, what was skipped, where this was."""
    parts = [f"{_title(report)}, {precision}:\n\n{table}" for precision, table in _tables(report)]
    return "\n\n".join([*parts, *_notes(report)]) + "\n"


def grouped(results: Results) -> dict[str, Results]:
    """What was measured, by precision, in the order of the columns."""
    groups = {
        precision: {
            key: result
            for key, result in results.items()
            if "figures" in result and result["precision"] == precision
        }
        for precision in PRECISIONS
    }
    return {precision: group for precision, group in groups.items() if group}


def ratio_to_fastest_peer(group: Results, key: str, row: Row) -> float | None:
    """How many times better ``key`` is than the best peer of its group; above 1 it is ahead.

    None where the row has no better side or no peer has the figure.
    """
    medians = {
        name: result["figures"][row.figure]["median"]
        for name, result in group.items()
        if row.figure in result["figures"]
    }
    peers = [value for name, value in medians.items() if not is_gptx(name)]
    if not row.better or not peers or key not in medians:
        return None
    ratio = medians[key] / max(peers) if row.better == "more" else min(peers) / medians[key]
    return ratio if ratio > 0 else None


def is_gptx(key: str) -> bool:
    return key.startswith("gptx:")


def _tables(report: dict[str, Any]) -> list[tuple[str, str]]:
    workload = report["workload"]
    sizes = {
        "prefill": len(workload["prefill"]),
        "decode": len(workload["decode"]),
        "sequences": len(workload["batch"]),
    }
    found = []
    for precision, group in grouped(report["variants"]).items():
        ours = [key for key in group if is_gptx(key)]
        ours = ours if len(ours) < len(group) else []  # nobody to compare with
        titles = [*map(_column, group), *(f"{_column(key)} : best peer" for key in ours)]
        lines = [_line(["", *titles]), "|---" * (1 + len(titles)) + "|"]
        for row in ROWS:
            cells = [_cell(result["figures"].get(row.figure), row) for result in group.values()]
            ratios = [ratio_to_fastest_peer(group, key, row) for key in ours]
            cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in ratios]
            lines.append(_line([row.label.format(**sizes), *cells]))
        found.append((precision, "\n".join(lines)))
    return found


def _column(key: str) -> str:
    return key.replace(":", " ")


def _title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    millions = report["parameters"] / 1e6
    size = f"{millions:.0f}M" if millions >= 1 else f"{millions:.2f}M"
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return f"{settings['name']} ({size}), {threads}"


def _cell(figure: dict[str, float] | None, row: Row) -> str:
    return "unknown" if figure is None else Spread(**figure).show(row.scale, row.digits)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _notes(report: dict[str, Any]) -> list[str]:
    machine, settings, results = report["machine"], report["settings"], report["variants"]
    rounds = settings["repeat"] * settings["passes"]
    notes = [
        f"Median (least..most) of {rounds} rounds on {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{machine['isas'][0]}, {machine['system']}; commit {report['versions']['commit']}, "
        f"{report['time'][:10]}.",
        f"Versions: {_versions(results)}.",
    ]
    if settings["dtype"] != "float32":
        notes.append(f"The weights are those of a {settings['dtype']} file.")
    if settings["quick"]:
        notes.append("A quick run: nothing here is a measurement.")
    if any("check" in result for result in results.values()):
        notes.append(_checks(results))
    notes += [
        f"Failed: {key}: {result['failed']}."
        for key, result in results.items()
        if "failed" in result
    ]
    skipped: dict[str, list[str]] = {}
    for key, result in results.items():
        if "skipped" in result:
            skipped.setdefault(result["skipped"], []).append(key)
    notes += [f"Skipped: {', '.join(keys)}: {reason}." for reason, keys in skipped.items()]
    return notes


def _versions(results: Results) -> str:
    found = {}
    for result in results.values():
        found |= result.get("versions", {})
    return ", ".join(f"{package} {version}" for package, version in found.items())


def _checks(results: Results) -> str:
    """Every variant against gptx in float32, and the setting that was chosen for it."""
    lines = [
        _line(["check", "largest error of a logit", "error / spread", "same top token", "setting"]),
        "|---" * 5 + "|",
    ]
    for key, result in results.items():
        if "max_logit_difference" not in result.get("check", {}):
            continue
        check = result["check"]
        setting = ", ".join(f"{name}={value}" for name, value in result["setting"].items())
        cells = [
            f"{check['max_logit_difference']:.1e}",
            f"{check['relative_error']:.1e}",
            f"{check['top1_agreement']:.1%}",
            setting,
        ]
        lines.append(_line([_column(key), *cells]))
    return "\n".join(lines)
