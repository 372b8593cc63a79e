"""What the engine saves: many requests together, prefixes that come again, drafts, shared prompts,
logits that nobody asks for, tokens that a guide forces.

    python bench/engine.py                       gpt2 shape, int8, beside CTranslate2 if installed
    python bench/engine.py --parts prefix,choose --rounds 9

Each part, in a process of its own, checks its results before it times them, and compares within one
run; medians with least and most.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import gptx
import machine
import workloads
from gptx import _core, modelfile
from measuring import Spread
from peers import PEERS, reason_to_skip

GREEDY: dict[str, Any] = {"temperature": 0, "ignore_eos": True}
_REQUESTS = 64
_GOALS = {
    "64 requests together : one after another": "at least 4",
    "64 requests together : CTranslate2's best batching": "at least 1.5",
    "repeated prefix of 512 : its prefill": "at most 0.05",
    "prompt lookup, text that repeats itself": "at least 1.8",
    "prompt lookup, other text": "at least 0.97",
    "choose among 4 : one prefill": "at most 1.3",
}


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    if options.model:
        print(json.dumps(PARTS[options.parts[0]](options)))
        return 0
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="gptx-bench-") as folder:
        path = Path(folder) / "int8.gptx"
        config = workloads.config_named(options.shape)
        print(f"writing random {options.shape} weights", file=sys.stderr)
        modelfile.write(
            path, config, workloads.RandomTensors(config), dtype="int8", source="random"
        )
        for part in options.parts:
            print(f"measuring: {part}", file=sys.stderr)
            figures |= _in_a_process(part, path, options)
    report = {
        "machine": machine.describe_machine(),
        "settings": {"shape": options.shape, "threads": options.threads, "rounds": options.rounds},
        "figures": figures,
    }
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    print(table(figures))
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=workloads.SHAPES, default="gpt2")
    parser.add_argument("--threads", type=int, default=_core.usable_cpus())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--precision", default="int8", help="int8 (default) or int8-fast")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH")
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)  # in a part's process
    options = parser.parse_args(argv)
    options.parts = [name for name in options.parts.split(",") if name]
    for name in options.parts:
        if name not in PARTS:
            parser.error(f"--parts: expected some of {', '.join(PARTS)}, got {name!r}")
    for name in ("threads", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1, got {getattr(options, name)}")
    return options


def _in_a_process(part: str, path: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--parts", part, "--model", str(path)]
    for name in ("threads", "rounds", "precision"):
        command += [f"--{name}", str(getattr(options, name))]
    env = machine.environment_for(options.threads)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=env, check=True)
    return json.loads(done.stdout)


def table(figures: dict[str, Any]) -> str:
    lines = ["| | median (least..most) | goal |", "|---|---|---|"]
    for name, figure in figures.items():
        text = figure if isinstance(figure, str) else Spread(**figure).show(1, 3)
        lines.append(f"| {name} | {text} | {_GOALS.get(name, '')} |")
    return "\n".join(lines)


def ragged(options: argparse.Namespace) -> dict[str, Any]:
    """64 requests of 8 to 192 tokens that want 16 to 96 more."""
    config = modelfile.read(options.model, verify=False).config
    rng = np.random.default_rng(3)
    room = config.block_size // 2
    prompts = [_ids(config, rng, min(int(n), room)) for n in rng.integers(8, 193, _REQUESTS)]
    lengths = [min(int(n), room) for n in rng.integers(16, 97, _REQUESTS)]
    model = _load(options)

    def together() -> list[tuple[int, ...]]:
        return _generate(model, prompts, lengths)

    def one_by_one() -> list[tuple[int, ...]]:
        return [_generate(model, [p], [n])[0] for p, n in zip(prompts, lengths, strict=True)]

    _require(together() == one_by_one(), "requests are not the same together and alone")
    works: dict[str, Callable[[], object]] = {"together": together, "alone": one_by_one}
    skipped = reason_to_skip(PEERS["ctranslate2"])
    if not skipped:
        batches = _ctranslate2(options, prompts, lengths)
        once = {name: _seconds(work) for name, work in batches.items()}
        best = min(once, key=lambda name: once[name])
        works[best] = batches[best]
    seconds = _alternate(works, options.rounds)
    tokens = sum(lengths)
    figures: dict[str, Any] = {
        "64 requests together, tokens/s": _spread([tokens / s for s in seconds["together"]]),
        "64 requests together : one after another": _ratio(seconds["alone"], seconds["together"]),
    }
    name = "64 requests together : CTranslate2's best batching"
    if skipped:
        return figures | {name: skipped}
    return figures | {
        f"CTranslate2, {best}, tokens/s": _spread([tokens / s for s in seconds[best]]),
        name: _ratio(seconds[best], seconds["together"]),
    }


def _ctranslate2(
    options: argparse.Namespace, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> dict[str, Callable[[], object]]:
    """The same requests sorted by length, in batches that share the longest one's limit."""
    from peers.ctranslate2_peer import Peer

    with tempfile.TemporaryDirectory(prefix="gptx-bench-") as folder:
        path = Peer.prepare(str(options.model), Path(folder), "int8")
        peer = Peer(path, options.threads, "int8")
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), lengths[i]))

    def run(size: int) -> None:
        for begin in range(0, len(order), size):
            batch = order[begin : begin + size]
            peer.generate([prompts[i] for i in batch], max(lengths[i] for i in batch))

    return {f"batches of {n}": lambda n=n: run(n) for n in (4, 8, 16, 32)}  # type: ignore[misc]


def prefix(options: argparse.Namespace) -> dict[str, Any]:
    """The same 512 tokens again, with another question behind them each time."""
    config = modelfile.read(options.model, verify=False).config
    rng = np.random.default_rng(4)
    length = min(512, config.block_size // 2)
    model = _load(options, prefix_cache_bytes=1 << 30)
    plain = _load(options)
    cold, warm = [], []
    for _ in range(options.rounds):
        text = _ids(config, rng, length)
        cold.append(_seconds(lambda text=text: model.generate(text, max_new_tokens=1, **GREEDY)))
        asked = text + _ids(config, rng, 1)
        warm.append(_seconds(lambda ids=asked: model.generate(ids, max_new_tokens=1, **GREEDY)))
        again = model.generate(asked, max_new_tokens=4, **GREEDY)
        expected = plain.generate(asked, max_new_tokens=4, **GREEDY)
        _require(again.token_ids == expected.token_ids, "a cached prefix changes the text")
        _require(length < 64 or again.cached_tokens > 0, "the prefix was not cached")
    return {
        "prefill of 512, ms": _spread([1e3 * s for s in cold]),
        "repeated prefix of 512 : its prefill": _ratio(warm, cold),
    }


def lookup(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy text of random weights falls into a loop, which is copying; drawn text does not."""
    config = modelfile.read(options.model, verify=False).config
    rng = np.random.default_rng(5)
    model = _load(options)
    n = min(128, config.block_size // 4)
    prompt = _ids(config, rng, n // 4)
    loop = list(model.generate(prompt, max_new_tokens=n, **GREEDY).token_ids)
    drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "seed": 1, "ignore_eos": True}
    figures: dict[str, Any] = {}
    for name, ids, params in (
        ("text that repeats itself", prompt + loop, GREEDY),
        ("other text", prompt, drawn),
    ):

        def run(
            ids: list[int] = ids, params: dict[str, Any] = params, **more: Any
        ) -> gptx.Generation:
            return model.generate(ids, max_new_tokens=n, **params, **more)

        with_drafts = run(prompt_lookup=8)
        _require(with_drafts.token_ids == run().token_ids, "drafts change the text")
        works = {"plain": run, "drafts": lambda run=run: run(prompt_lookup=8)}
        seconds = _alternate(works, options.rounds)
        figures[f"prompt lookup, {name}"] = _ratio(seconds["plain"], seconds["drafts"])
        used = f"{with_drafts.accepted_tokens} of {with_drafts.drafted_tokens}"
        figures[f"drafts that were right, {name}"] = used
    return figures


def choose(options: argparse.Namespace) -> dict[str, Any]:
    """Four options of 1 to 4 tokens behind a prompt of 256."""
    config = modelfile.read(options.model, verify=False).config
    rng = np.random.default_rng(6)
    prompt = _ids(config, rng, min(256, config.block_size // 2))
    options_ids = [_ids(config, rng, n) for n in (1, 2, 3, 4)]
    model = _load(options)
    alone = [model.score(ids, prompt=prompt) for ids in options_ids]
    _require(model.choose(prompt, options_ids).scores.tolist() == alone, "scores differ in company")
    seconds = _alternate(
        {
            "choose": lambda: model.choose(prompt, options_ids),
            "prefill": lambda: model.generate(prompt, max_new_tokens=1, **GREEDY),
        },
        options.rounds,
    )
    return {"choose among 4 : one prefill": _ratio(seconds["choose"], seconds["prefill"])}


def embed(options: argparse.Namespace) -> dict[str, Any]:
    """The states behind all 512 tokens of a text, of which no logits are asked."""
    config = modelfile.read(options.model, verify=False).config
    ids = _ids(config, np.random.default_rng(7), min(512, config.block_size // 2))
    model = _load(options)
    mean = model.hidden_states(ids)[-1].mean(axis=0, dtype=np.float64)
    _require(np.allclose(model.embed(ids), mean, rtol=1e-6), "embed is not the mean of the states")
    seconds = _alternate(
        {
            "embed": lambda: model.embed(ids),
            "prefill": lambda: model.generate(ids, max_new_tokens=1, **GREEDY),
        },
        options.rounds,
    )
    return {"embed a text : its prefill": _ratio(seconds["embed"], seconds["prefill"])}


def guided(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second with a guide and without, on the embedded model, whose steps are short."""
    if importlib.util.find_spec("llguidance") is None:
        return {"guided : free tokens/s": 'skipped: pip install "gptx[guided]"'}
    model = gptx.load(threads=options.threads, prefix_cache_bytes=0)
    keys = {f"the name of the king number {i}": {"enum": ["yes", "no"]} for i in range(6)}
    schema = {"type": "object", "properties": keys, "required": list(keys)}
    schema["additionalProperties"] = False
    figures: dict[str, Any] = {}
    for name, guide in (
        ("any text", gptx.guided.regex("(?s:.*)")),
        ("JSON of known keys", gptx.guided.json_schema(schema)),
    ):

        def run(guide: Any = None, n: int = 100) -> gptx.Generation:
            return model.generate("Once upon a time", max_new_tokens=n, guide=guide, **GREEDY)

        n = run(guide).completion_tokens
        seconds = _alternate(
            {
                "guided": lambda run=run, guide=guide: run(guide),
                "free": lambda run=run, n=n: run(n=n),
            },
            options.rounds,
        )
        figures[f"guided : free tokens/s, {name}"] = _ratio(seconds["free"], seconds["guided"])
    return figures


PARTS = {
    "ragged": ragged,
    "prefix": prefix,
    "lookup": lookup,
    "choose": choose,
    "embed": embed,
    "guided": guided,
}


def _load(options: argparse.Namespace, **more: Any) -> gptx.Model:
    """Without a prefix cache, unless told otherwise: a prompt must cost the same each time."""
    return gptx.load(
        options.model,
        threads=options.threads,
        precision=options.precision,
        **({"prefix_cache_bytes": 0} | more),
    )


def _generate(
    model: gptx.Model, prompts: Sequence[Sequence[int]], lengths: Sequence[int]
) -> list[tuple[int, ...]]:
    """Requests that want different numbers of tokens, all at the same time."""
    engine = model._engine
    running: dict[int, int] = {}
    tokens: list[list[int]] = [[] for _ in prompts]
    for i, (ids, n) in enumerate(zip(prompts, lengths, strict=True)):
        request = engine.submit(ids, sampling={"temperature": 0.0}, max_new_tokens=n)
        running[request] = i
    while running:
        for request, token, finish, *_ in engine.advance(list(running)):
            tokens[running[request]].append(token)
            if finish:
                del running[request]
                engine.release(request)
    return [tuple(t) for t in tokens]


def _ids(config: Any, rng: np.random.Generator, n: int) -> list[int]:
    return rng.integers(0, config.vocab_size, n).tolist()


def _alternate(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each work, in turns, since the machine's speed drifts."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for work in works.values():
        work()
    for _ in range(rounds):
        for name, work in works.items():
            seconds[name].append(_seconds(work))
    return seconds


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _spread(values: list[float]) -> dict[str, float]:
    return vars(Spread.of(values))


def _ratio(above: list[float], below: list[float]) -> dict[str, float]:
    return _spread([a / b for a, b in zip(above, below, strict=True)])


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise SystemExit(f"check failed: {otherwise}")


if __name__ == "__main__":
    sys.exit(main())
