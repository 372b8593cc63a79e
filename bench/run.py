"""The table of the README: gptx beside its peers on the same weights, prompts, threads and dtype.

    python bench/run.py                          gpt2 shape, float32, every peer that is installed
    python bench/run.py --shape gpt2-medium --threads 4 --json medium.json
    python bench/run.py --model gpt2.gptx --peers transformers

Each peer runs in its own process, never beside another, and is checked before it is timed. How the
figures are made is in bench/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import machine
import report as reporting
import workloads
from gptx import _core, modelfile
from peers import PEERS, reason_to_skip

_HERE = Path(__file__).parent
_TIMEOUT_SECONDS = 3600
_LOGIT_TOLERANCE = 1e-4


class PeerFailedError(Exception):
    """A process of a peer did not end well; the message is its last line."""


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    with tempfile.TemporaryDirectory(prefix="gptx-bench-") as folder:
        report = run(options, Path(folder))
    path = options.json or default_json(report)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(reporting.table(report))
    say(f"every sample: {path}")
    return 1 if any("failed" in peer for peer in report["peers"].values()) else 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=workloads.SHAPES, default="gpt2", help="random weights")
    model.add_argument("--model", type=Path, metavar="FILE", help="a .gptx file instead")
    parser.add_argument("--dtype", choices=modelfile.DTYPES, default="float32", help="with --shape")
    parser.add_argument("--threads", type=int, default=_core.usable_cpus())
    parser.add_argument("--repeat", type=int, default=3, help="rounds in each process")
    parser.add_argument("--passes", type=int, default=2, help="processes of each peer, in turns")
    parser.add_argument(
        "--peers", default=",".join(PEERS), help="comma-separated; gptx is always measured"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="default: in bench/results/")
    parser.add_argument("--quick", action="store_true", help="to try the script, not to measure")
    options = parser.parse_args(argv)
    for name in ("threads", "repeat", "passes"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    options.peers = [name for name in options.peers.split(",") if name]
    for name in options.peers:
        if name not in PEERS:
            parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {name!r}")
    if options.quick:
        options.repeat, options.passes = min(options.repeat, 2), 1
    return options


def run(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything the JSON holds."""
    model = options.model or folder / "random.gptx"
    if not options.model:
        say(f"writing random {options.shape} weights as {options.dtype}")
        config = workloads.config_named(options.shape)
        modelfile.write(
            model, config, workloads.RandomTensors(config), dtype=options.dtype, source="random"
        )
    header = modelfile.read(model, verify=False)
    workload = workloads.make_workload(header.config, quick=options.quick)
    settings = {
        "name": options.model.name if options.model else options.shape,
        "dtype": header.dtype,
        **{name: getattr(options, name) for name in ("threads", "repeat", "passes", "quick")},
    }
    names = ["gptx", *(name for name in PEERS if name in options.peers and name != "gptx")]
    peers = {name: {"skipped": reason_to_skip(PEERS[name])} for name in names}
    peers = {name: peer if peer["skipped"] else {} for name, peer in peers.items()}

    common = {
        "model": str(model),
        "workload": dataclasses.asdict(workload),
        **{name: settings[name] for name in ("threads", "repeat", "quick")},
    }
    check_peers(peers, common, folder)
    measure_peers(peers, common, options.passes, folder)
    for peer in peers.values():
        if "rounds" in peer and "failed" not in peer:
            figures = reporting.figures(header.config, workload, peer)
            peer["figures"] = {name: dataclasses.asdict(f) for name, f in figures.items()}
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine.describe_machine(),
        "versions": machine.describe_versions(),
        "settings": settings,
        "config": header.config.to_dict(),
        "parameters": header.config.n_params,
        "workload": dataclasses.asdict(workload),
        "peers": peers,
    }


def check_peers(peers: dict[str, Any], common: dict[str, Any], folder: Path) -> None:
    """Has every peer answer the workload and compares with gptx, the first of them."""
    for name, peer in peers.items():
        if "skipped" in peer:
            continue
        own = folder / name
        own.mkdir()
        say(f"{name}: checking")
        task = {"peer": name, "phase": "answer", "folder": str(own), "logits": str(own / "x.npy")}
        try:
            answer = call_peer({**common, **task}, own)
        except PeerFailedError as error:
            if name == "gptx":
                raise SystemExit(f"gptx failed: {error}") from None
            peer["failed"] = str(error)
            continue
        peer.update(answer, logits=task["logits"])
        if name != "gptx":
            peer["check"] = compare(peer, peers["gptx"])
            if not peer["check"]["passed"]:
                peer["failed"] = "its results are not those of gptx; not timed"


def compare(peer: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Passed where every logit is close and all greedy tokens are equal."""
    ours, theirs = (np.load(p["logits"], mmap_mode="r") for p in (reference, peer))
    difference = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else np.inf
    tolerance = _LOGIT_TOLERANCE * max(1.0, float(np.abs(ours).max()))
    tokens_equal = peer["tokens"] == reference["tokens"]
    return {
        "max_logit_difference": difference,
        "tolerance": tolerance,
        "tokens_equal": tokens_equal,
        "passed": bool(difference <= tolerance and tokens_equal),
    }


def measure_peers(peers: dict[str, Any], common: dict[str, Any], passes: int, folder: Path) -> None:
    """Times the peers in turns, so that a slow minute of the machine does not fall on one alone."""
    for i in range(passes):
        for name, peer in peers.items():
            if "skipped" in peer or "failed" in peer:
                continue
            say(f"{name}: measuring, {i + 1} of {passes}")
            task = {
                "peer": name,
                "phase": "measure",
                "path": peer["path"],
                "tokens": peer["tokens"],
            }
            try:
                result = call_peer({**common, **task}, folder / name)
            except PeerFailedError as error:
                peer["failed"] = str(error)
                continue
            for key, samples in result.items():
                kept = samples if isinstance(samples, list) else [samples]
                peer[key] = peer.get(key, []) + kept
    for peer in peers.values():  # of the check only; the files are about to go
        for key in ("path", "logits", "tokens"):
            peer.pop(key, None)


def call_peer(task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Runs one phase of one peer in a new process and waits for it."""
    request, reply = folder / "task.json", folder / "reply.json"
    reply.unlink(missing_ok=True)
    request.write_text(json.dumps({**task, "reply": str(reply)}))
    command = [sys.executable, str(_HERE / "peer_process.py"), str(request)]
    try:
        done = subprocess.run(
            command,
            env=machine.environment_for(task["threads"]),
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
    name = f"{stamp}-{settings['name']}-{settings['dtype']}-{settings['threads']}threads.json"
    return _HERE / "results" / name


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
