"""Is gptx on the GPU right? Asked at the very shapes that are timed, against torch in float32."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gptx import _core
from gptx.config import GPTConfig
from gpu_bench import driving

RELATIVE_ERROR = {"float32": 1e-3, "bfloat16": 2e-2, "int8": 2e-2}
"""Bound of the error of the logits, root mean square, over that of the logits."""

_COMPANY = 32  # prompts that share a step with rows that are scored

Reference = Callable[[NDArray[np.int32]], Tensor]
"""Token ids [T] to float32 logits [T, V] of the same rounded weights."""


class Agreement(NamedTuple):
    """How near logits are to their reference, and greedy tokens to its choice.

    Attributes:
        relative_error: root mean square of the error over that of the reference.
        max_difference: the largest error over that root mean square.
        other_tokens: how many tokens are not the reference's first choice.
        unexplained: of these, how many it rates lower than errors of that size can explain.
    """

    relative_error: float
    max_difference: float
    other_tokens: int
    unexplained: int


def compare(logits: NDArray[np.float32], exact: Tensor, tokens: Sequence[int]) -> Agreement:
    """Logits [T, V] of a sequence that ends with greedy ``tokens``, and the exact ones [T, V].

    A choice between logits that are each off by at most e costs at most 2 e.
    """
    ours = torch.from_numpy(logits).to(exact.device)
    size = float(exact.double().square().mean().sqrt())
    difference = (ours - exact).abs_()
    error = float(difference.double().square().mean().sqrt())
    largest = float(difference.max())
    rows = exact[-1 - len(tokens) : -1]  # each chose the token that follows it
    chosen = torch.tensor(tokens, device=exact.device)[:, None]
    lost = rows.amax(dim=1) - rows.gather(1, chosen)[:, 0]
    return Agreement(
        relative_error=error / size,
        max_difference=largest / size,
        other_tokens=int((lost > 0).sum()),
        unexplained=int((~(lost <= 2 * largest)).sum()),
    )


def check(
    config: GPTConfig,
    precision: str,
    engine: _core.Engine,
    reference: Reference,
    batch: int = 64,
) -> dict[str, Any]:
    """Everything that is promised of the engine, for a short prompt and for the longest.

    Args:
        batch: sequences that are decoded together and some of them again alone.

    Returns:
        The figures of both; "failures" says what is out of bounds, nothing where all is well.
    """
    bound = RELATIVE_ERROR[precision]
    steps = min(64, config.block_size // 4)
    found: dict[str, Any] = {"bound": bound}
    failures: list[str] = []
    for prompt in (min(32, steps), config.block_size - 1 - steps):
        ids = driving.random_prompts(config, [prompt], seed=prompt)[0]
        tokens = driving.generate(engine, [ids], steps)[0]
        sequence = np.concatenate([ids, np.asarray(tokens, np.int32)])
        logits = engine.logits(sequence)
        agreement = compare(logits, reference(sequence), tokens)
        found[f"{len(sequence)} tokens"] = agreement._asdict()
        failures += (
            f"{len(sequence)} tokens: {problem}"
            for problems in (
                _out_of_bounds(agreement, bound),
                _not_repeated(engine, ids, sequence, tokens, logits),
                _not_the_same_in_company(config, engine, sequence, logits),
            )
            for problem in problems
        )
    failures += _not_the_same_alone(config, engine, batch, steps)
    failures += _not_the_same_in_many_rows(config, engine)
    return found | {"failures": failures}


def _out_of_bounds(agreement: Agreement, bound: float) -> Iterator[str]:
    if not agreement.relative_error <= bound:  # NaN is out of bounds too
        yield f"relative error {agreement.relative_error:.1e}, allowed is {bound:.0e}"
    if agreement.unexplained:
        yield f"{agreement.unexplained} greedy tokens are not near the reference's choice"


def _not_repeated(
    engine: _core.Engine,
    ids: NDArray[np.int32],
    sequence: NDArray[np.int32],
    tokens: list[int],
    logits: NDArray[np.float32],
) -> Iterator[str]:
    """Two more runs of what has been run once."""
    for _ in range(2):
        if not np.array_equal(engine.logits(sequence), logits):
            yield "the same logits twice are not the same bits"
        if driving.generate(engine, [ids], len(tokens))[0] != tokens:
            yield "the same prompt twice gives other tokens"


def _not_the_same_in_company(
    config: GPTConfig,
    engine: _core.Engine,
    sequence: NDArray[np.int32],
    logits: NDArray[np.float32],
) -> Iterator[str]:
    """The first rows are scored in one step with prompts, which then wait for their reader."""
    others = driving.random_prompts(config, [1 + n % 9 for n in range(_COMPANY)], seed=1)
    requests = [engine.submit(ids, sampling=driving.GREEDY, max_new_tokens=2) for ids in others]
    again = engine.logits(sequence)
    for request in requests:
        engine.release(request)
    if not np.array_equal(again, logits):
        yield f"logits beside {_COMPANY} prompts are not the bits of those alone"


def _not_the_same_alone(
    config: GPTConfig, engine: _core.Engine, batch: int, steps: int
) -> Iterator[str]:
    prompts = driving.random_prompts(config, [3 + 5 * n % 29 for n in range(batch)], seed=2)
    together = driving.generate(engine, prompts, steps)
    for i in (0, 1, batch // 2 - 1, batch - 1):
        if driving.generate(engine, [prompts[i]], steps)[0] != together[i]:
            yield f"sequence {i} among {batch} is not what it is alone"


def _not_the_same_in_many_rows(config: GPTConfig, engine: _core.Engine) -> Iterator[str]:
    """Whole prompts are computed together; logits of every position, a few rows at a time."""
    prompts = driving.random_prompts(config, [config.block_size - 1 - n for n in range(3)], seed=3)
    held = [
        engine.submit(ids, sampling=driving.GREEDY, max_new_tokens=1, held=True) for ids in prompts
    ]
    waiting = set(held)
    while waiting:
        waiting -= {request for request, *_ in engine.advance(sorted(waiting))}
    for ids, request in zip(prompts, held, strict=True):
        together = engine.held_logits(request)[-1]
        engine.release(request)
        if not np.array_equal(together, engine.logits(ids)[-1]):
            yield f"{len(ids)} rows at once do not give the bits of a few at a time"
