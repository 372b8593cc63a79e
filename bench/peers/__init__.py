"""What gptx is measured beside. A peer is one module here with a class `Peer`:

- ``Peer.prepare(model_path, folder)`` writes the weights of a ``.gptx`` file in the peer's own
  format and returns its path; untimed;
- ``Peer(path, threads)`` loads them, ready to generate; timed;
- ``generate(prompts, n)`` gives the n greedy tokens of each prompt, none ended early; timed;
- ``logits(ids)`` gives float32 [T, V]; for the check;
- ``Peer.versions()`` names what ran.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass


@dataclass(frozen=True)
class PeerEntry:
    """Where a peer is implemented and what it needs; ``module`` is "" where there is none yet."""

    module: str = ""
    requires: tuple[str, ...] = ()


PEERS = {
    "gptx": PeerEntry("peers.gptx_peer"),
    "transformers": PeerEntry("peers.transformers_peer", ("torch", "transformers", "safetensors")),
    "llama.cpp": PeerEntry(),
    "ctranslate2": PeerEntry(),
    "onnxruntime": PeerEntry(),
    "openvino": PeerEntry(),
}


def reason_to_skip(entry: PeerEntry) -> str:
    """Why a peer cannot be measured here, or "" if it can."""
    if not entry.module:
        return "not part of this version"
    missing = [name for name in entry.requires if importlib.util.find_spec(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (pip install 'gptx[bench]')"
    return ""
