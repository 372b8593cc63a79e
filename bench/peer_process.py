"""One variant in a process of its own: ``python peer_process.py TASK.json``, started by run.py.

The task says what to do and where the reply goes. Phase "answer" writes the model in the peer's
format and gives its logits and tokens for the check; phase "measure" times.
"""

from __future__ import annotations

import gc
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from machine import process_memory
from measuring import Yardsticks, seconds_of
from peers import PEERS, REFERENCE, UnavailableError
from workloads import Workload

_LOADS_AFTERWARDS = 2


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    workload = Workload(**task["workload"])
    start = time.perf_counter()
    peer_type = importlib.import_module(PEERS[task["peer"]].module).Peer
    import_seconds = time.perf_counter() - start
    if task["phase"] == "answer":
        try:
            reply = answer(peer_type, workload, task)
        except UnavailableError as error:
            reply = {"unavailable": str(error)}
    else:
        reply = {"import_seconds": import_seconds, **measure(peer_type, workload, task)}
    Path(task["reply"]).write_text(json.dumps(reply))


def answer(peer_type: Any, workload: Workload, task: dict[str, Any]) -> dict[str, Any]:
    """The results of the very calls that will be timed, and the logits of the longest prompt."""
    path = peer_type.prepare(task["model"], Path(task["folder"]), task["variant"])
    peer = peer_type(path, task["threads"], task["variant"])
    np.save(task["logits"], peer.logits(workload.prefill))
    tokens = {name: generate(peer, workload, name) for name in _CALLS}
    reply = {"path": path, "versions": peer_type.versions(), "tokens": tokens}
    if task["key"] == REFERENCE:
        reply["margins"] = {name: margins(peer, workload, name, tokens[name]) for name in _CALLS}
    if task["trial"]:
        reply["trial_seconds"] = {
            name: least_seconds(peer, workload, name, task["repeat"]) for name in _CALLS
        }
    return reply


def margins(peer: Any, workload: Workload, name: str, tokens: list[list[int]]) -> list[list[float]]:
    """How far the logit of each generated token is above the second largest."""
    prompts, _ = _CALLS[name](workload)
    return [
        _top_margins(peer.logits([*prompt, *new])[len(prompt) - 1 : -1]).tolist()
        for prompt, new in zip(prompts, tokens, strict=True)
    ]


def _top_margins(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """The largest less the second largest of each row of [T, V]."""
    second, first = np.partition(logits, (-2, -1), axis=1)[:, -2:].T
    return first - second


def measure(peer_type: Any, workload: Workload, task: dict[str, Any]) -> dict[str, Any]:
    before = process_memory()
    loads = []

    def load() -> Any:
        start = time.perf_counter()
        peer = peer_type(task["path"], task["threads"], task["variant"])
        loads.append(time.perf_counter() - start)
        return peer

    peer = load()
    loaded = process_memory()
    for name in _CALLS:  # also the warm-up
        check(generate(peer, workload, name), task["tokens"][name], name)
    # Before the yardsticks take memory of their own.
    memory = {"imported": before, "loaded": loaded, "used": process_memory()}

    yardsticks = Yardsticks(task["threads"], task["arithmetic"], quick=task["quick"])
    rounds = [one_round(peer, workload, task["tokens"], yardsticks) for _ in range(task["repeat"])]
    del peer
    for _ in range(_LOADS_AFTERWARDS):
        gc.collect()
        load()
    return {"load_seconds": loads, "memory": memory, "rounds": rounds}


_CALLS = {
    "prefill": lambda w: ([w.prefill], 1),
    "decode_first": lambda w: ([w.decode], 1),
    "decode_all": lambda w: ([w.decode], 1 + w.n_decode),
    "batch_first": lambda w: (w.batch, 1),
    "batch_all": lambda w: (w.batch, 1 + w.n_decode),
}


def generate(peer: Any, workload: Workload, name: str) -> list[list[int]]:
    prompts, n = _CALLS[name](workload)
    return peer.generate(prompts, n)


def one_round(
    peer: Any, workload: Workload, expected: dict[str, Any], yardsticks: Yardsticks
) -> dict[str, float]:
    """Seconds of every call, and the yardsticks before and after each group of them.

    Decoding is the time of 1 + n tokens without the time of the first. That is short, so it is run
    once before it is timed: the yardsticks have emptied the caches.
    """
    times: dict[str, float] = {}

    def timed(name: str) -> None:
        tokens: list[list[int]] = []
        times[name] = seconds_of(lambda: tokens.extend(generate(peer, workload, name)))
        check(tokens, expected[name], name)

    times["prefill_peak_before"] = yardsticks.peak()
    timed("prefill")
    times["prefill_peak_after"] = yardsticks.peak()

    times["decode_read_before"] = yardsticks.read()
    generate(peer, workload, "decode_first")
    timed("decode_first")
    timed("decode_all")
    times["decode_read_after"] = yardsticks.read()

    times["batch_peak_before"] = yardsticks.peak()
    times["batch_read_before"] = yardsticks.read()
    generate(peer, workload, "batch_first")
    timed("batch_first")
    timed("batch_all")
    times["batch_read_after"] = yardsticks.read()
    times["batch_peak_after"] = yardsticks.peak()
    return times


def least_seconds(peer: Any, workload: Workload, name: str, repeat: int) -> float:
    """Of a call that has run before."""
    return min(seconds_of(lambda: generate(peer, workload, name)) for _ in range(repeat))


def check(tokens: list[list[int]], expected: list[list[int]], name: str) -> None:
    if tokens != expected:
        raise SystemExit(f"{name}: expected the tokens {expected} of the check, got {tokens}")


if __name__ == "__main__":
    main()
