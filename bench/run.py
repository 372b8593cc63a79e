"""The tables of the README: gptx beside its peers on the same weights, prompts and threads.

    python bench/run.py                          gpt2 shape, every peer that is installed
    python bench/run.py --shape gpt2-medium --threads 4 --json medium.json --chart medium.png
    python bench/run.py --model gpt2.gptx --peers transformers,ctranslate2:int8
    python bench/run.py --from-json medium.json --chart medium.png

Each variant of a peer runs in its own process, never beside another, and is checked before it is
timed. How the figures are made is in bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import checking
import machine
import report as reporting
import workloads
from gptx import _core, modelfile
from peers import PEERS, PRECISIONS, REFERENCE, VARIANTS, Variant, reason_to_skip, select

_HERE = Path(__file__).parent
_TIMEOUT_SECONDS = 3600


class PeerFailedError(Exception):
    """A process of a peer did not end well; the message is its last line."""


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    if options.from_json:
        report = json.loads(options.from_json.read_text())
    else:
        with tempfile.TemporaryDirectory(prefix="gptx-bench-") as folder:
            report = run(options, Path(folder))
        path = options.json or default_json(report)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(report, indent=1) + "\n")
        say(f"every sample: {path}")
    print(reporting.tables(report))
    if options.chart:
        import chart  # matplotlib is needed for nothing else

        say("chart: " + ", ".join(map(str, chart.draw(report, options.chart))))
    return 1 if any("failed" in result for result in report["variants"].values()) else 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--shape", choices=workloads.SHAPES, default="gpt2", help="random weights")
    source.add_argument("--model", type=Path, metavar="FILE", help="a .gptx file instead")
    source.add_argument("--from-json", type=Path, metavar="FILE", help="show this, measure nothing")
    parser.add_argument("--threads", type=int, default=_core.usable_cpus())
    parser.add_argument("--repeat", type=int, default=3, help="rounds in each process")
    parser.add_argument("--passes", type=int, default=2, help="processes of each variant, in turns")
    parser.add_argument(
        "--peers",
        default=",".join(PEERS),
        metavar="PEER[:VARIANT],...",
        help=f"some of {', '.join(VARIANTS)}; gptx is always measured",
    )
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: in bench/results/")
    parser.add_argument("--chart", type=Path, metavar="PATH", help="as PATH.png and PATH.svg")
    parser.add_argument("--quick", action="store_true", help="to try the script, not to measure")
    options = parser.parse_args(argv)
    for name in ("threads", "repeat", "passes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    try:
        options.variants = select(*(_names(text) for text in (options.peers, options.precisions)))
    except ValueError as error:
        parser.error(str(error))
    if options.quick:
        options.repeat, options.passes = min(options.repeat, 2), 1
    return options


def _names(text: str) -> list[str]:
    return [name for name in text.split(",") if name]


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything the JSON holds."""
    model = options.model or folder / "random.gptx"
    if not options.model:
        say(f"writing random {options.shape} weights")
        config = workloads.config_named(options.shape)
        modelfile.write(model, config, workloads.RandomTensors(config), source="random")
    header = modelfile.read(model, verify=False)
    workload = workloads.make_workload(header.config, quick=options.quick)
    settings = {
        "name": options.model.name if options.model else options.shape,
        "dtype": header.dtype,
        **{name: getattr(options, name) for name in ("threads", "repeat", "passes", "quick")},
    }
    common = {
        "model": str(model),
        "workload": dataclasses.asdict(workload),
        **{name: settings[name] for name in ("threads", "repeat", "quick")},
    }
    results = check_variants(options.variants, common, folder)
    measure_variants(results, common, options.passes, folder)
    for key, result in results.items():
        if "rounds" in result and "failed" not in result:
            storage = VARIANTS[key].storage
            figures = reporting.figures(header.config, storage, workload, result)
            result["figures"] = {name: dataclasses.asdict(f) for name, f in figures.items()}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
        "settings": settings,
        "config": header.config.to_dict(),
        "parameters": header.config.n_params,
        "workload": dataclasses.asdict(workload),
        "variants": results,
    }


def check_variants(
    variants: list[Variant], common: dict[str, Any], folder: Path
) -> dict[str, dict[str, Any]]:
    """Has every variant answer the workload and compares with the reference.

    Returns:
        Of each variant what the JSON holds so far; "skipped" or "failed" where it is not timed.
    """
    reference = answer(VARIANTS[REFERENCE], {}, common, folder)
    if "tokens" not in reference:
        raise SystemExit(f"{REFERENCE}: {reference}")
    return {
        variant.key: {
            "precision": variant.precision,
            **check_variant(variant, reference, common, folder),
        }
        for variant in variants
    }


def check_variant(
    variant: Variant, reference: dict[str, Any], common: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The checked answer of its fastest setting."""
    reason = reason_to_skip(PEERS[variant.peer])
    if reason:
        return {"skipped": reason}
    tries = []
    for setting in variant.settings:
        is_reference = variant.key == REFERENCE
        found = dict(reference) if is_reference else answer(variant, setting, common, folder)
        if "tokens" in found:
            found["check"] = compare(variant, found, reference)
            if not found["check"]["passed"]:
                found["failed"] = "its results are not those of gptx; not timed"
        tries.append(found)
    best = min(tries, key=_trial_score)
    if len(tries) == 1:
        return best
    kept = ("setting", "trial_seconds", "failed")
    return best | {
        "tries": [{name: found[name] for name in kept if name in found} for found in tries]
    }


def answer(
    variant: Variant, setting: dict[str, str], common: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """The reply of phase "answer", or why there is none."""
    own = folder / variant.peer
    own.mkdir(exist_ok=True)
    named = " ".join(f"{name}={value}" for name, value in setting.items())
    say(f"{variant.key}: checking {named}".rstrip())
    logits = folder / f"{variant.key}.npy"
    task = {
        "phase": "answer",
        "folder": str(own),
        "logits": str(logits),
        "trial": len(variant.settings) > 1,
    }
    try:
        reply = call_peer(variant, {**common, **task}, setting, folder)
    except PeerFailedError as error:
        return {"setting": setting, "failed": str(error)}
    if "unavailable" in reply:
        return {"skipped": reply["unavailable"]}
    return {"setting": setting, "logits": logits, **reply}


def compare(variant: Variant, found: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The check of one answer; its logits are read for the last time."""
    logits = np.load(found["logits"])
    if variant.key != REFERENCE:
        found["logits"].unlink()
    return checking.compare(
        variant.precision,
        logits,
        found["tokens"],
        np.load(reference["logits"], mmap_mode="r"),
        reference["tokens"],
        reference["margins"],
        variant.logit_tolerance,
    )


def _trial_score(found: dict[str, Any]) -> float:
    """Less is better: the geometric mean of the seconds of the calls; what failed comes last."""
    if "failed" in found or "skipped" in found:
        return math.inf
    seconds = found.get("trial_seconds", {}).values()
    return math.prod(seconds) ** (1 / max(1, len(seconds)))


def measure_variants(
    results: dict[str, dict[str, Any]], common: dict[str, Any], passes: int, folder: Path
) -> None:
    """Times them in turns, so that a slow minute of the machine does not fall on one alone."""
    for i in range(passes):
        for key, result in results.items():
            if "skipped" in result or "failed" in result:
                continue
            say(f"{key}: measuring, {i + 1} of {passes}")
            task = {"phase": "measure", "path": result["path"], "tokens": result["tokens"]}
            try:
                found = call_peer(VARIANTS[key], {**common, **task}, result["setting"], folder)
            except PeerFailedError as error:
                result["failed"] = str(error)
                continue
            for name, samples in found.items():
                kept = samples if isinstance(samples, list) else [samples]
                result[name] = result.get(name, []) + kept
    for result in results.values():  # of the check only; the files are about to go
        for name in ("path", "logits", "tokens", "margins"):
            result.pop(name, None)


def call_peer(
    variant: Variant, task: dict[str, Any], setting: dict[str, str], folder: Path
) -> dict[str, Any]:
    """Runs one phase of one variant in a new process and waits for it."""
    request, reply = folder / "task.json", folder / "reply.json"
    reply.unlink(missing_ok=True)
    named = {
        "key": variant.key,
        "peer": variant.peer,
        "variant": variant.name,
        "arithmetic": variant.peak,
    }
    request.write_text(json.dumps({**named, **task, "reply": str(reply)}))
    command = [sys.executable, str(_HERE / "peer_process.py"), str(request)]
    try:
        done = subprocess.run(
            command,
            env=machine.environment_for(task["threads"]) | setting,
            stderr=subprocess.PIPE,
            text=True,
            timeout=_TIMEOUT_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise PeerFailedError(f"no answer within {_TIMEOUT_SECONDS} s") from None
    if done.returncode != 0 or not reply.exists():
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        say(done.stderr)
        raise PeerFailedError(lines[-1])
    return json.loads(reply.read_text())


def default_json(report: dict[str, Any]) -> Path:
    settings = report["settings"]
    stamp = report["time"][:19].replace(":", "").replace("-", "")
    name = f"{stamp}-{settings['name']}-{settings['threads']}threads.json"
    return _HERE / "results" / name


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
