"""ONNX Runtime on the graph of onnx_graph.py, every tensor bound to a buffer made beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from peers.onnx_graph import cache_names, write_graph
from peers.weights import canonical_weights


class Peer:
    def __init__(self, path: str, threads: int, variant: str) -> None:
        del variant  # the file says it
        onnxruntime.disable_telemetry_events()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        self._session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        cached = [value for value in self._session.get_inputs() if value.name.startswith("past.")]
        self._n_layer = len(cached) // 2
        _, self._n_head, _, self._head_size = cached[0].shape
        self._vocab_size = self._session.get_outputs()[0].shape[1]

    @staticmethod
    def prepare(model_path: str, folder: Path, variant: str) -> str:
        path = folder / f"{variant}.onnx"
        if not path.exists():
            write_graph(*canonical_weights(model_path), variant, path)
        return str(path)

    @staticmethod
    def versions() -> dict[str, str]:
        return {"onnxruntime": onnxruntime.__version__}

    def generate(self, prompts: Sequence[Sequence[int]], n: int) -> list[list[int]]:
        """Prompts are padded on the right; attention ends at each sequence's own length."""
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        ids = np.zeros((len(prompts), width), dtype=np.int64)
        for row, prompt in zip(ids, prompts, strict=True):
            row[: len(prompt)] = prompt
        positions = np.broadcast_to(np.arange(width), ids.shape)
        cache = self._new_cache(len(prompts), width + n)
        rows = np.arange(len(prompts)) * width + lengths - 1
        chosen = [self._step(cache, ids, positions, rows, lengths).argmax(-1)]
        rows = np.arange(len(prompts))
        while len(chosen) < n:
            positions = lengths[:, None]
            lengths = lengths + 1
            logits = self._step(cache, chosen[-1][:, None], positions, rows, lengths)
            chosen.append(logits.argmax(-1))
        return np.stack(chosen, axis=1).tolist()

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        rows = np.arange(len(ids))
        cache = self._new_cache(1, len(ids))
        return self._step(cache, np.array([ids]), rows[None], rows, np.array([len(ids)]))

    def _new_cache(self, batch: int, capacity: int) -> dict[str, onnxruntime.OrtValue]:
        shape = (batch, self._n_head, capacity, self._head_size)
        return {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for name in cache_names(self._n_layer, "")
        }

    def _step(
        self,
        cache: dict[str, onnxruntime.OrtValue],
        ids: NDArray[np.int64],  # [B, T]
        positions: NDArray[np.int64],  # [B, T]
        rows: NDArray[np.int64],  # [K], of the flattened [B T]
        lengths: NDArray[np.int64],  # [B], this step included
    ) -> NDArray[np.float32]:
        """Logits [K, V]; the cache is written where it lies."""
        binding = self._session.io_binding()
        inputs = {
            "ids": ids,
            "positions": positions,
            "rows": rows,
            "lengths": (lengths - 1).astype(np.int32),
            "total": np.array(lengths.max(), dtype=np.int32),
        }
        for name, value in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        logits = np.empty((len(rows), self._vocab_size), dtype=np.float32)
        binding.bind_output("logits", "cpu", 0, np.float32, list(logits.shape), logits.ctypes.data)
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"past{name}", value)
            binding.bind_ortvalue_output(f"present{name}", value)
        self._session.run_with_iobinding(binding)
        return logits
