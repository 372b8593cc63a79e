"""OpenVINO's CPU plugin on the graph of openvino_graph.py, its KV cache inside the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import openvino as ov
from numpy.typing import NDArray

from peers import UnavailableError
from peers.openvino_graph import write_graph
from peers.weights import canonical_weights, pad_left

_HIDDEN = np.finfo(np.float32).min  # in the mask; minus infinity in a whole row would give NaN
_PRECISIONS = {
    # OpenVINO would choose bfloat16 and an 8-bit cache by itself where the CPU has them.
    "float32": {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"},
    "bfloat16": {"INFERENCE_PRECISION_HINT": "bf16", "KV_CACHE_PRECISION": "bf16"},
}


class Peer:
    def __init__(self, path: str, threads: int, variant: str) -> None:
        options = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            **_PRECISIONS.get(variant, {}),
        }
        self._request = ov.Core().compile_model(path, "CPU", options).create_infer_request()

    @staticmethod
    def prepare(model_path: str, folder: Path, variant: str) -> str:
        if variant == "bfloat16":
            able = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
            if "BF16" not in able:
                raise UnavailableError("OpenVINO has no bfloat16 on this CPU")
        kind = "float32" if variant == "bfloat16" else variant
        path = folder / f"{kind}.xml"
        if not path.exists():
            write_graph(*canonical_weights(model_path), kind, path)
        return str(path)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"openvino": ov.__version__.split("-")[0]}

    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        ids, real = pad_left(prompts)
        batch, width = ids.shape
        positions = np.maximum(real.cumsum(1) - 1, 0)
        visible = np.pad(real, ((0, 0), (0, n)), constant_values=1).astype(bool)
        rows = np.arange(1, batch + 1) * width - 1
        self._request.reset_state()
        best = self._step(ids, positions, _mask(visible[:, :width], width), rows).argmax(-1)
        chosen = [best]
        positions = positions[:, -1:]
        while len(chosen) < n:
            positions = positions + 1
            seen = _mask(visible[:, : width + len(chosen)], 1)
            best = self._step(best[:, None], positions, seen, np.arange(batch)).argmax(-1)
            chosen.append(best)
        return np.stack(chosen, axis=1).tolist()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        rows = np.arange(len(ids))
        self._request.reset_state()
        visible = np.ones((1, len(ids)), dtype=bool)
        return self._step(np.array([ids]), rows[None], _mask(visible, len(ids)), rows).copy()

    def _step(
        self,
        ids: NDArray[np.int64],  # [B, T]
        positions: NDArray[np.int64],  # [B, T]
        mask: NDArray[np.float32],  # [B, 1, T, S]
        rows: NDArray[np.int64],  # [K], of the flattened [B T]
    ) -> NDArray[np.float32]:
        """Logits [K, V], valid until the next step."""
        inputs = {
            "ids": ids,
            "positions": positions,
            "mask": mask,
            "rows": rows,
            "beams": np.arange(len(ids), dtype=np.int32),
        }
        return self._request.infer(inputs, share_inputs=True, share_outputs=True)["logits"]


def _mask(visible: NDArray[np.bool_], new: int) -> NDArray[np.float32]:
    """[B, 1, new, S] of 0 and `_HIDDEN`: the last ``new`` of S tokens see themselves and before.

    Args:
        visible: [B, S], False where a sequence is padded.
    """
    s = visible.shape[1]
    seen = np.tri(new, s, s - new, dtype=bool) & visible[:, None, None, :]
    return np.where(seen, np.float32(0), _HIDDEN)
