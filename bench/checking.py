"""Are a variant's results those of gptx in float32? Asked before anything is timed."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

RELATIVE_ERROR = {"bfloat16": 0.05, "int8": 0.25, "int4": 0.5}
"""Error of the logits (root mean square) over their spread that rounding the weights may make.

Sums of 8-bit products that saturate, as peers allow on AVX2, are within it. A model with a wrong,
missing or transposed tensor is at 1; a peer's graph itself is held by its float32 variant.
"""


def compare(
    precision: str,
    logits: NDArray[np.float32],  # [T, V]
    tokens: dict[str, list[list[int]]],
    reference: NDArray[np.float32],  # [T, V]
    reference_tokens: dict[str, list[list[int]]],
    margins: dict[str, list[list[float]]],
    logit_tolerance: float,
) -> dict[str, Any]:
    """What the JSON holds of the check; ``passed`` decides whether the variant is timed.

    Args:
        tokens, reference_tokens: of each timed call the greedy tokens of each sequence.
        margins: how far each reference token's logit is above the second largest.
        logit_tolerance: of a float32 variant, relative to the largest logit above 1.
    """
    if logits.shape != reference.shape:
        return {"passed": False, "shape": list(logits.shape), "expected": list(reference.shape)}
    difference = logits - reference
    tolerance = logit_tolerance * max(1.0, float(np.abs(reference).max()))
    result = {
        "max_logit_difference": float(np.abs(difference).max()),
        "relative_error": float(np.sqrt(np.mean(np.square(difference))) / reference.std()),
        "top1_agreement": float(np.mean(logits.argmax(1) == reference.argmax(1))),
        "tokens_equal": tokens == reference_tokens,
    }
    if precision == "float32":
        agree = tokens_agree(tokens, reference_tokens, margins, tolerance)
        result |= {"tolerance": tolerance, "tokens_agree": agree}
        result["passed"] = agree and result["max_logit_difference"] <= tolerance
    else:
        result["tolerance"] = RELATIVE_ERROR[precision]
        result["passed"] = result["relative_error"] <= result["tolerance"]
    return result


def tokens_agree(
    tokens: dict[str, list[list[int]]],
    reference: dict[str, list[list[int]]],
    margins: dict[str, list[list[float]]],
    tolerance: float,
) -> bool:
    """Equal up to a first difference where the two best logits are closer than the tolerance.

    What follows such a tie continues another text and is not compared.
    """
    for name, sequences in reference.items():
        if [*map(len, tokens[name])] != [*map(len, sequences)]:
            return False
        for found, expected, margin in zip(tokens[name], sequences, margins[name], strict=True):
            differing = (i for i in range(len(expected)) if found[i] != expected[i])
            first = next(differing, None)
            if first is not None and margin[first] > tolerance:
                return False
    return True
