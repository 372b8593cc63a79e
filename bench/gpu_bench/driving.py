"""Drives `gptx._core.Engine`, so that no text is in what is timed.

A request whose tokens have not been fetched is not stepped, and a step takes every other request
along: so requests can be made to wait for each other after their prompts, and then decode together.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

import workloads
from gptx import _core
from gptx.config import GPTConfig
from gptx.loading import STEP_TOKENS
from gptx.packing import padded
from gpu_bench.roofline import Cost
from peers import VARIANTS

STEPS_AT_ONCE = 8
"""Tokens of each sequence that the engine computes in one call where nothing else is to do."""

GREEDY: dict[str, Any] = {"temperature": 0.0}

_KV_BLOCK = 64  # positions


@dataclass(frozen=True)
class DecodeCase:
    """Sequences of one length that decode together.

    Attributes:
        batch: how many.
        prompt: tokens of each prompt.
        steps: tokens of each sequence that are timed, after the first one.
    """

    batch: int
    prompt: int
    steps: int

    @property
    def new_tokens(self) -> int:
        return 1 + self.steps

    @property
    def context(self) -> float:
        """Positions that a timed token attends to, on average."""
        return workloads.mean_context(self.prompt, self.steps)


@dataclass(frozen=True)
class Sample:
    """One timed call: the tokens it gave, all sequences together."""

    tokens: int
    seconds: float


def decode_case(config: GPTConfig, batch: int, context: int, steps: int = 64) -> DecodeCase:
    """Sequences whose timed steps lie around ``context``, or end with the model's window."""
    prompt = min(context - steps // 2, config.block_size - 1 - steps)
    return DecodeCase(batch, max(1, prompt), steps)


def decode_cost(config: GPTConfig, precision: str, case: DecodeCase) -> Cost:
    """Of one step, a token for each sequence."""
    contexts = [case.context] * case.batch
    storage = VARIANTS[f"gptx:{precision}"].storage
    return Cost(
        workloads.step_bytes(config, storage, contexts), workloads.step_flops(config, contexts)
    )


def prefill_cost(config: GPTConfig, precision: str, tokens: int, prompts: int = 1) -> Cost:
    """Of whole prompts, with the logits of their last positions."""
    weights = workloads.step_bytes(config, VARIANTS[f"gptx:{precision}"].storage, [])
    return Cost(weights, prompts * workloads.prefill_flops(config, tokens))


def open_engine(
    config: GPTConfig,
    dtype: str,
    packed: Mapping[str, NDArray],
    library: str,
    sequences: int,
    **options: str,
) -> _core.Engine:
    """An engine on the GPU whose cache holds so many sequences of the whole context.

    Args:
        packed: stored tensors; they are copied to the device.
        library: the path of libgptx_cuda.
        options: ``precision`` and ``kv_cache_dtype`` of the engine.
    """
    # Not less than the cache takes of a head's width in any type; exact where that is 64.
    block = config.n_layer * config.n_head * 2 * _KV_BLOCK * padded(config.head_size, 64)
    kind = options.get("kv_cache_dtype") or ("float32" if dtype == "float32" else "bfloat16")
    itemsize = {"float32": 4, "bfloat16": 2, "int8": 2}[kind]
    blocks = sequences * -(-config.block_size // _KV_BLOCK)
    return _core.Engine(
        config.to_dict(),
        dtype,
        dict(packed),
        device="cuda",
        cuda_library=library,
        step_tokens=STEP_TOKENS["cuda"],
        kv_cache_bytes=blocks * block * itemsize,
        **options,
    )


def random_prompts(config: GPTConfig, lengths: Sequence[int], seed: int = 0) -> list[NDArray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n, dtype=np.int32) for n in lengths]


def start(engine: _core.Engine, prompts: Sequence[NDArray], new_tokens: int) -> dict[int, int]:
    """Submits prompts and computes them all.

    Returns:
        The first token of each request. None has gone on while others were still at their prompt.
    """
    requests = [engine.submit(ids, sampling=GREEDY, max_new_tokens=new_tokens) for ids in prompts]
    events = engine.advance(requests[-1:])  # prompts are computed in this order
    if len(requests) > 1:
        events += engine.advance(requests[:-1])
    if sorted(request for request, *_ in events) != requests:
        raise RuntimeError(f"{len(prompts)} prompts gave {len(events)} first tokens")
    found = {request: token for request, token, *_ in events}
    return {request: found[request] for request in requests}


def finish(engine: _core.Engine, first: Mapping[int, int]) -> tuple[list[list[int]], list[Sample]]:
    """Decodes requests to their end, together.

    Returns:
        The tokens of each request, the first one included, and a sample of each call.
    """
    tokens = {request: [token] for request, token in first.items()}
    running = list(first)
    samples = []
    while running:
        begin = time.perf_counter()
        events = engine.advance(running)  # returns when the device is done
        samples.append(Sample(len(events), time.perf_counter() - begin))
        for request, token, why, *_ in events:
            if token < 0:
                raise RuntimeError(f"a request ended with {why!r} after {len(tokens[request])}")
            tokens[request].append(token)
            if why:
                running.remove(request)
                engine.release(request)
    return list(tokens.values()), samples


def generate(engine: _core.Engine, prompts: Sequence[NDArray], n: int) -> list[list[int]]:
    """The n greedy tokens of each prompt, scheduled as the engine likes."""
    requests = [engine.submit(ids, sampling=GREEDY, max_new_tokens=n) for ids in prompts]
    tokens: dict[int, list[int]] = {request: [] for request in requests}
    running = set(requests)
    while running:
        for request, token, why, *_ in engine.advance(list(running)):
            if token >= 0:
                tokens[request].append(token)
            if why:
                running.discard(request)
                engine.release(request)
    return [tokens[request] for request in requests]


def time_decode(
    engine: _core.Engine, config: GPTConfig, case: DecodeCase, repeats: int
) -> list[Sample]:
    """Samples of ``repeats`` generations, after one that records what the device will run."""
    prompts = random_prompts(config, [case.prompt] * case.batch)
    samples: list[Sample] = []
    for repeat in range(1 + repeats):
        tokens, found = finish(engine, start(engine, prompts, case.new_tokens))
        if any(len(sequence) != case.new_tokens for sequence in tokens):
            raise RuntimeError(f"expected {case.new_tokens} tokens of each sequence")
        if repeat > 0:
            samples += found
    return samples


def time_prefill(
    engine: _core.Engine, config: GPTConfig, tokens: int, repeats: int, prompts: int = 1
) -> list[Sample]:
    """Samples of prompts of one length, from their submission to their first new tokens."""
    samples = []
    for repeat in range(2 + repeats):
        ids = random_prompts(config, [tokens] * prompts, seed=repeat)
        begin = time.perf_counter()
        generate(engine, ids, 1)
        if repeat >= 2:
            samples.append(Sample(tokens * prompts, time.perf_counter() - begin))
    return samples


def time_end_to_end(
    engine: _core.Engine, config: GPTConfig, batch: int, prompt: int, new: int, repeats: int
) -> list[Sample]:
    """Samples of whole generations: prompts, scheduling and decoding; the new tokens count."""
    samples = []
    prompts = random_prompts(config, [prompt] * batch)
    for repeat in range(1 + repeats):
        begin = time.perf_counter()
        count = sum(map(len, generate(engine, prompts, new)))
        if repeat > 0:
            samples.append(Sample(count, time.perf_counter() - begin))
    return samples
