"""Single kernels against the machine's peak, in every precision: checked, then timed.

    python bench/kernels.py                           all precisions, gpt2's matrices, one thread
    python bench/kernels.py --isa avx2 --precisions int8,bfloat16 --rows 1,8,512
    python bench/kernels.py --json kernels.json

One thread, because threads share nothing but memory here. The share is the time that the slower of
two limits needs over the time taken: the multiply-adds of the precision in registers, and up to 8
rows, as of a decoding step, a plain read of the weights. Both are measured before and after each
sample. Such few rows take copies of a matrix in turns, so that they find it in memory, not in a
cache.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import machine
from gptx import _core
from gptx.packing import pack_panels, pad_end, padded
from gptx.quantize import dequantize_rows, expand_bfloat16, quantize_rows, round_bfloat16
from measuring import Spread

PRECISIONS = ("float32", "bfloat16", "int8", "int8-fast")
_BYTES = {"float32": 4, "bfloat16": 2, "int8": 1, "int8-fast": 1}
# Relative to the size of the outputs: the rounding of the activations.
_TOLERANCE = {"float32": 1e-5, "bfloat16": 1e-2, "int8": 1e-3, "int8-fast": 5e-2}
_SHAPES = {  # N, K of gpt2's matrices; the head is cut to keep the check short
    "c_attn": (2304, 768),
    "attn c_proj": (768, 768),
    "c_fc": (3072, 768),
    "mlp c_proj": (768, 3072),
    "lm_head": (12544, 768),
}
_BEYOND_CACHES = 192 * 2**20  # bytes of copies, so that a single row reads memory
_DECODE_ROWS = 8  # up to here a step decodes, and finds its weights in memory
_SECONDS = 0.1


class Matrix:
    """A random weight [N, K], packed, with as many copies as no cache holds."""

    def __init__(self, precision: str, n: int, k: int, *, copies: bool) -> None:
        weight = np.random.default_rng(0).standard_normal((n, k), dtype=np.float32)
        self.scale, self.colsum = np.zeros(padded(n), np.float32), np.zeros(padded(n), np.int32)
        if precision == "float32":
            packed = pack_panels(weight)
        elif precision == "bfloat16":
            bits = round_bfloat16(weight)
            weight, packed = expand_bfloat16(bits), pack_panels(bits, 2)
        else:
            q, scale, colsum = quantize_rows(weight)
            weight, packed = dequantize_rows(q, scale), pack_panels(q, 4)
            self.scale, self.colsum = pad_end(scale, padded(n)), pad_end(colsum, padded(n))
        self.precision, self.weight = precision, weight
        count = -(-_BEYOND_CACHES // packed.nbytes) if copies else 1
        self.packed = [packed, *(packed.copy() for _ in range(count - 1))]
        self.bias = np.zeros(padded(n), np.float32)

    def linear(self, isa: str, act: np.ndarray) -> np.ndarray:
        packed = self.packed[0]
        return _core.testing.linear(
            isa, self.precision, act, packed, self.scale, self.colsum, self.bias
        )

    def seconds(self, isa: str, act: np.ndarray, calls: int) -> float:
        return _core.testing.time_linear(
            isa, self.precision, act, self.packed, self.scale, self.colsum, self.bias, calls
        )


def main(argv: list[str] | None = None) -> int:
    options = parse_options(argv)
    samples = []
    print(
        f"{'isa':12} {'precision':10} {'matrix':12} {'rows':>5} "
        f"{'rate':>21} {'share of the limit':>24}"
    )
    for isa in options.isa:
        for precision in options.precisions:
            for name in options.matrices:
                for rows in options.rows:
                    sample = measure(isa, precision, name, rows, options.repeat)
                    samples.append(sample)
                    rate, share = Spread(**sample["rate"]), Spread(**sample["share"])
                    unit = "GB/s " if rows == 1 else "GOP/s"
                    print(
                        f"{isa:12} {precision:10} {name:12} {rows:5}   "
                        f"{rate.show(1e-9, 1):>20} {unit} {share.show(1, 2):>18}",
                        flush=True,
                    )
    if options.json:
        report = {
            "machine": machine.describe_machine(),
            "versions": machine.describe_versions(),
            "samples": samples,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


def parse_options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    isas = _core.usable_isas()
    parser.add_argument("--isa", default=isas[0], help=f"comma-separated of {', '.join(isas)}")
    parser.add_argument("--precisions", default=",".join(PRECISIONS))
    parser.add_argument("--matrices", default=",".join(_SHAPES))
    parser.add_argument("--rows", default="1,2,4,8,512", help="rows of activations")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--json", type=Path, metavar="PATH")
    options = parser.parse_args(argv)
    for name, allowed in (("isa", isas), ("precisions", PRECISIONS), ("matrices", _SHAPES)):
        chosen = getattr(options, name).split(",")
        for value in chosen:
            if value not in allowed:
                parser.error(f"--{name}: expected some of {', '.join(allowed)}, got {value!r}")
        setattr(options, name, chosen)
    options.rows = [int(rows) for rows in options.rows.split(",")]
    return options


def measure(isa: str, precision: str, name: str, rows: int, repeat: int) -> dict[str, Any]:
    n, k = _SHAPES[name]
    matrix = Matrix(precision, n, k, copies=rows <= _DECODE_ROWS)
    act = np.random.default_rng(1).standard_normal((rows, k), dtype=np.float32)
    check(matrix, isa, act)

    operations, size = 2.0 * rows * n * k, float(n * k * _BYTES[precision])
    work = size if rows == 1 else operations
    memory = np.ones(256 * 2**20 // 4, np.float32) if rows <= _DECODE_ROWS else None

    def limit() -> float:
        """Seconds that the slower of memory and arithmetic needs."""
        arithmetic = operations / _core.testing.probe_peak(isa, precision, 1, 100_000)
        if memory is None:
            return arithmetic
        return max(arithmetic, size / _core.testing.probe_read(isa, 1, memory))

    calls = max(1, int(_SECONDS / matrix.seconds(isa, act, len(matrix.packed))))
    rates, shares = [], []
    for _ in range(repeat):
        before = limit()
        seconds = matrix.seconds(isa, act, calls)
        rates.append(work / seconds)
        shares.append((before + limit()) / 2 / seconds)
    spread = {"rate": Spread.of(rates), "share": Spread.of(shares)}
    return {
        "isa": isa,
        "precision": precision,
        "matrix": name,
        "rows": rows,
        "n": n,
        "k": k,
        **{key: vars(value) for key, value in spread.items()},
    }


def check(matrix: Matrix, isa: str, act: np.ndarray) -> None:
    """Against float64, on a few rows; SystemExit where the kernel is wrong."""
    ours = matrix.linear(isa, act)
    rows = [0, len(act) // 2, len(act) - 1]
    exact = act[rows].astype(float) @ matrix.weight.T.astype(float)
    error = np.abs(ours[rows][:, : len(matrix.weight)] - exact).max() / exact.std()
    if not error <= _TOLERANCE[matrix.precision]:
        raise SystemExit(
            f"{isa} {matrix.precision}: error {error:.1e} of an output's size, expected at most "
            f"{_TOLERANCE[matrix.precision]:.0e}; not timed"
        )


if __name__ == "__main__":
    sys.exit(main())
