"""From samples to figures, and from figures to the Markdown table."""

from __future__ import annotations

from typing import Any

import workloads
from gptx.config import GPTConfig
from measuring import Spread
from workloads import Workload

Round = dict[str, float]


def figures(config: GPTConfig, workload: Workload, result: dict[str, Any]) -> dict[str, Spread]:
    """What the table shows of one peer. Every figure is made within a round, then summarised."""
    rounds = result["rounds"]
    samples = [
        _prefill(config, workload, r) | _decode(config, workload, r) | _batch(config, workload, r)
        for r in rounds
    ]
    spreads = {name: Spread.of([sample[name] for sample in samples]) for name in samples[0]}
    spreads["load_seconds"] = Spread.of(result["load_seconds"])
    spreads["fma_peak"] = Spread.of(_readings(rounds, "_fma_"))
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
        "prefill_share_of_fma_peak": flops / _around(r, "prefill_fma"),
    }


def _decode(config: GPTConfig, workload: Workload, r: Round) -> dict[str, float]:
    n = workload.n_decode
    seconds = (r["decode_all"] - r["decode_first"]) / n
    context = workloads.mean_context(len(workload.decode), n)
    rate = workloads.step_bytes(config, [context]) / seconds
    return {
        "decode_tokens_per_second": 1 / seconds,
        "decode_bytes_per_second": rate,
        "decode_share_of_read_bandwidth": rate / _around(r, "decode_read"),
    }


def _batch(config: GPTConfig, workload: Workload, r: Round) -> dict[str, float]:
    n = workload.n_decode
    seconds = (r["batch_all"] - r["batch_first"]) / n
    contexts = [workloads.mean_context(len(prompt), n) for prompt in workload.batch]
    bound = max(
        workloads.step_bytes(config, contexts) / _around(r, "batch_read"),
        workloads.step_flops(config, contexts) / _around(r, "batch_fma"),
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


_ROWS = (
    ("prefill, {prefill} tokens: tokens/s", "prefill_tokens_per_second", 1, 0),
    ("· GFLOP/s", "prefill_flops_per_second", 1e-9, 0),
    ("· share of the FMA peak", "prefill_share_of_fma_peak", 1, 2),
    ("decode, batch 1: tokens/s", "decode_tokens_per_second", 1, 1),
    ("· GB/s read", "decode_bytes_per_second", 1e-9, 1),
    ("· share of the read bandwidth", "decode_share_of_read_bandwidth", 1, 2),
    ("decode, {sequences} ragged sequences: tokens/s", "batch_tokens_per_second", 1, 0),
    ("· share of the roofline", "batch_share_of_roofline", 1, 2),
    ("load, warm: ms", "load_seconds", 1e3, 0),
    ("· memory it allocates: MB", "load_anonymous_bytes", 1e-6, 0),
    ("peak memory: MB", "peak_memory_bytes", 1e-6, 0),
    ("· allocated, not mapped from the file: MB", "anonymous_memory_bytes", 1e-6, 0),
    ("FMA peak beside it: GFLOP/s", "fma_peak", 1e-9, 0),
    ("read bandwidth beside it: GB/s", "read_bandwidth", 1e-9, 1),
)


def table(report: dict[str, Any]) -> str:
    """Markdown: a column for each measured peer, then what was skipped and where this was."""
    measured = {name: peer for name, peer in report["peers"].items() if "figures" in peer}
    workload = report["workload"]
    titles = [
        ", ".join(f"{package} {version}" for package, version in peer["versions"].items())
        for peer in measured.values()
    ]
    lines = [_line([_title(report), *titles]), "|---" * (1 + len(titles)) + "|"]
    for label, name, scale, digits in _ROWS:
        label = label.format(prefill=len(workload["prefill"]), sequences=len(workload["batch"]))
        cells = [_cell(peer["figures"].get(name), scale, digits) for peer in measured.values()]
        lines.append(_line([label, *cells]))
    return "\n".join([*lines, "", *_notes(report)]) + "\n"


def _title(report: dict[str, Any]) -> str:
    settings = report["settings"]
    dtype = settings["dtype"]
    if dtype != "float32":
        dtype += " file, expanded to float32"
    millions = report["parameters"] / 1e6
    size = f"{millions:.0f}M" if millions >= 1 else f"{millions:.2f}M"
    threads = "1 thread" if settings["threads"] == 1 else f"{settings['threads']} threads"
    return f"{settings['name']} ({size}), {dtype}, {threads}"


def _cell(figure: dict[str, float] | None, scale: float, digits: int) -> str:
    return "unknown" if figure is None else Spread(**figure).show(scale, digits)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _notes(report: dict[str, Any]) -> list[str]:
    machine, settings = report["machine"], report["settings"]
    rounds = settings["repeat"] * settings["passes"]
    notes = [
        f"Median (least..most) of {rounds} rounds on {machine['cpu']}, {machine['cpus']} CPUs, "
        f"{machine['isas'][0]}, {machine['system']}; commit {report['versions']['commit']}, "
        f"{report['time'][:10]}.",
    ]
    if settings["quick"]:
        notes.append("A quick run: nothing here is a measurement.")
    for name, peer in report["peers"].items():
        if "check" in peer:
            check = peer["check"]
            notes.append(
                f"Check of {name}: {'passed' if check['passed'] else 'FAILED'}, largest difference "
                f"of a logit {check['max_logit_difference']:.1e}, "
                f"greedy tokens {'equal' if check['tokens_equal'] else 'differ'}."
            )
        if "failed" in peer:
            notes.append(f"Failed: {name}: {peer['failed']}.")
    skipped: dict[str, list[str]] = {}
    for name, peer in report["peers"].items():
        if "skipped" in peer:
            skipped.setdefault(peer["skipped"], []).append(name)
    notes += [f"Skipped: {', '.join(names)}: {reason}." for reason, names in skipped.items()]
    return "\n\n".join(notes).split("\n")
