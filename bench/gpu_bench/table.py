"""From records to the text that is shown last. It needs no more than the JSON."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from gpu_bench.roofline import Cost, Roof

Record = dict[str, Any]

_ROW = "{:<8} {:<9} {:<15}"
_SHOWN = "tokens/s, ± spread, share of the roofline"


def render(report: dict[str, Any]) -> str:
    """Everything, with what is missing, failed or was stopped said where it would stand."""
    records = report["records"]
    timed = [record for record in records if "tokens_per_second" in record]
    roof = roof_of(records)
    parts = [
        "\n".join(_heading(report, roof)),
        _parts(records),
        _micro(records),
        _table(
            f"decode, batch x context: {_SHOWN}",
            [record for record in timed if record["part"] == "decode"],
            roof,
            ("context", "batch"),
            lambda record: f"{record['batch']} x {record['context']:.0f}",
        ),
        _table(
            f"prefill, prompts x tokens: {_SHOWN}, TFLOP/s",
            [record for record in timed if record["part"] == "prefill"],
            roof,
            ("prompts", "tokens"),
            lambda record: f"{record['prompts']} x {record['tokens']}",
        ),
        _table(
            f"end to end, 128 new tokens after 32: {_SHOWN}",
            [record for record in timed if record["part"] == "end_to_end"],
            roof,
            ("batch",),
            lambda record: f"batch {record['batch']}",
        ),
    ]
    return "\n\n".join(part for part in parts if part)


def roof_of(records: Iterable[Record]) -> Roof | None:
    """The mean of what the yardsticks read before and after; None where they did not run."""
    read = [record for record in records if "flops_per_second" in record]
    if not read:
        return None

    def mean(name: str) -> float:
        return sum(record[name]["median"] for record in read) / len(read)

    return Roof(mean("bytes_per_second"), mean("flops_per_second"))


def _heading(report: dict[str, Any], roof: Roof | None) -> Iterable[str]:
    machine = next((record for record in report["records"] if "machine" in record), None)
    if machine:
        gpu, versions = machine["machine"].get("gpu", {}), machine["versions"]
        name = gpu.get("name") or ", ".join(device["name"] for device in machine["devices"])
        yield (
            f"{name}, driver {gpu.get('driver_version', 'unknown')}, "
            f"clocks {gpu.get('clocks.sm', '?')} (most {gpu.get('clocks.max.sm', '?')}); "
            f"torch {versions['torch']}, gptx {versions['gptx']}, commit {versions['commit']}"
        )
    if roof:
        yield (
            f"roofline: a copy at {roof.bytes_per_second / 1e12:.2f} TB/s, "
            f"products in bfloat16 at {roof.flops_per_second / 1e12:.0f} TFLOP/s"
        )


def _micro(records: Iterable[Record]) -> str:
    """What each part of a step took, and how fast that brought its bytes."""
    lines = []
    for record in records:
        if "microseconds" not in record:
            continue
        size, microseconds = record["bytes"], record["microseconds"]
        rate = f" {size / microseconds / 1e6:>8.2f} TB/s" if size else ""
        lines.append(f"{record['what']:<22} {size / 1e6:>10.2f} MB {microseconds:>10.2f} µs{rate}")
    return "\n".join(["what a step is made of", *lines]) if lines else ""


def _parts(records: Sequence[Record]) -> str:
    """What ran, how it ended and how long it took; of a check, how far off the logits are."""
    lines = []
    for record in records:
        if "status" not in record:
            continue
        about = [record[key] for key in ("part", "model", "precision", "by") if record.get(key)]
        detail = "; ".join(filter(None, (record.get("detail"), _agreement(records, record))))
        seconds = f"{record['seconds_taken']:5.0f} s" if "seconds_taken" in record else " " * 7
        lines.append(f"{' '.join(about):<42} {record['status']:<8} {seconds}  {detail}".rstrip())
    return "\n".join(lines)


def _agreement(records: Iterable[Record], about: Record) -> str:
    same = ("part", "model", "precision")
    for record in records:
        if "bound" in record and all(record[key] == about.get(key) for key in same):
            found = [value for name, value in record.items() if name.endswith(" tokens")]
            errors = [f"{agreement['relative_error']:.1e}" for agreement in found]
            most = max(agreement["max_difference"] for agreement in found)
            others = sum(agreement["other_tokens"] for agreement in found)
            return (
                f"{record['kernels']}, error {', '.join(errors)} of {record['bound']:.0e}, "
                f"largest {most:.1e}, {others} near ties"
            )
    return ""


def _table(
    title: str,
    records: Sequence[Record],
    roof: Roof | None,
    order: tuple[str, ...],
    name_of: Any,
) -> str:
    """One column for each case, one row for each way to run a model."""
    if not records:
        return ""
    ordered = sorted(records, key=lambda record: [record[key] for key in order])
    columns = list(dict.fromkeys(name_of(record) for record in ordered))
    cells: dict[tuple[str, str, str], dict[str, Record]] = {}
    for record in records:
        key = (record["model"], record["precision"], record["by"])
        cells.setdefault(key, {})[name_of(record)] = record
    lines = [[_ROW.format("", "", ""), *columns]]
    for group in dict.fromkeys(key[:2] for key in cells):
        rows = {key[2]: row for key, row in cells.items() if key[:2] == group}
        for by, row in rows.items():
            lines.append(
                [_ROW.format(*group, by), *(_cell(row.get(column), roof) for column in columns)]
            )
        if "gptx" in rows and any(not by.startswith("gptx") for by in rows):
            label = _ROW.format(*group, "gptx : best")
            lines.append([label, *(_ratio(rows, column) for column in columns)])
    width = 2 + max(len(cell) for _, *line in lines for cell in line)
    return "\n".join(
        [title, *(label + "".join(f"{cell:>{width}}" for cell in line) for label, *line in lines)]
    )


def _cell(record: Record | None, roof: Roof | None) -> str:
    if record is None:
        return "-"
    rate, seconds = record["tokens_per_second"], record["seconds"]["median"]
    spread = (rate["high"] - rate["low"]) / 2 / rate["median"]
    cost = Cost(**record["cost"])
    shown = f"{rate['median']:,.0f} ±{spread:.0%}"
    if roof:
        shown += f" {roof.share(cost, seconds):.2f}"
    if record["part"] == "prefill":
        shown += f" {cost.flops / seconds / 1e12:.0f}"
    return shown


def _ratio(rows: dict[str, dict[str, Record]], column: str) -> str:
    """How many times faster than the fastest peer."""
    medians = {
        by: row[column]["tokens_per_second"]["median"] for by, row in rows.items() if column in row
    }
    ours = medians.get("gptx")
    peers = [median for by, median in medians.items() if not by.startswith("gptx")]
    return f"{ours / max(peers):.2f}" if ours and peers else "-"
