"""What gptx is measured beside. A peer is one module here with a class `Peer`:

- ``Peer.prepare(model_path, folder, variant)`` writes the weights of a ``.gptx`` file in the peer's
  own format and returns its path; variants may share what lies in the folder; untimed;
- ``Peer(path, threads, variant)`` loads it, ready to generate; timed;
- ``generate(prompts, n)`` gives the n greedy tokens of each prompt, none ended early; timed;
- ``logits(ids)`` gives float32 [T, V]; for the check;
- ``Peer.versions()`` names what ran.

A variant that this machine cannot run raises `UnavailableError` in ``prepare``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from workloads import Storage

PRECISIONS = ("float32", "bfloat16", "int8", "int4")
"""What the weights are read as, in the order of the tables."""

REFERENCE = "gptx:float32"
"""Every other variant is checked against this one."""


class UnavailableError(Exception):
    """This variant cannot run here; the message says why."""


@dataclass(frozen=True)
class PeerEntry:
    """Where a peer is implemented, the modules it needs and the command that installs them."""

    module: str
    requires: tuple[str, ...] = ()
    install: str = ""


@dataclass(frozen=True)
class Variant:
    """One way to run a peer; a column of the table.

    Attributes:
        peer, name: together ``peer:name``, as ``--peers`` takes it.
        precision: the group of the table, one of `PRECISIONS`.
        storage: what a decode step reads, for the share of the bandwidth.
        arithmetic: the multiply-adds of `gptx.load`'s ``precision`` that are its peak; default the
            fastest of its group.
        settings: environments to try; the fastest whose results pass the check is measured.
        logit_tolerance: how far its logits may be off in float32, relative to the largest.
    """

    peer: str
    name: str
    precision: str
    storage: Storage
    settings: tuple[Mapping[str, str], ...] = ({},)
    logit_tolerance: float = 1e-4
    arithmetic: str = ""

    @property
    def key(self) -> str:
        return f"{self.peer}:{self.name}"

    @property
    def peak(self) -> str:
        """The precision whose peak its arithmetic is compared with."""
        return self.arithmetic or {"int8": "int8-fast", "int4": "int8-fast"}.get(
            self.precision, self.precision
        )


PEERS = {
    "gptx": PeerEntry("peers.gptx_peer"),
    "transformers": PeerEntry(
        "peers.transformers_peer",
        ("torch", "transformers", "safetensors"),
        "pip install torch transformers safetensors",
    ),
    "llama.cpp": PeerEntry(
        "peers.llama_cpp_peer",
        ("llama_cpp", "gguf"),
        "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python gguf",
    ),
    "ctranslate2": PeerEntry("peers.ctranslate2_peer", ("ctranslate2",), "pip install ctranslate2"),
    "onnxruntime": PeerEntry(
        "peers.onnxruntime_peer", ("onnx", "onnxruntime"), "pip install onnx onnxruntime"
    ),
    "openvino": PeerEntry("peers.openvino_peer", ("openvino",), "pip install openvino"),
}

_GELU_TABLE = 1e-3  # llama.cpp looks GELU up in a table of float16
_SCALE = 4  # bytes of a float32 scale
_MKL = ({"CT2_USE_MKL": "0"}, {"CT2_USE_MKL": "1"})
_FLASH = ({"LLAMA_ARG_FLASH_ATTN": "off"}, {"LLAMA_ARG_FLASH_ATTN": "on"})

VARIANTS = {
    variant.key: variant
    for variant in (
        Variant("gptx", "float32", "float32", Storage(4)),
        Variant("gptx", "bfloat16", "bfloat16", Storage(2, cache=2)),
        Variant("gptx", "int8", "int8", Storage(1, row=2 * _SCALE, cache=2), arithmetic="int8"),
        Variant("gptx", "int8-fast", "int8", Storage(1, row=2 * _SCALE, cache=2)),
        Variant("transformers", "float32", "float32", Storage(4)),
        Variant("transformers", "float32-compiled", "float32", Storage(4)),
        Variant("transformers", "bfloat16", "bfloat16", Storage(2, cache=2)),
        Variant("llama.cpp", "f32", "float32", Storage(4), _FLASH, _GELU_TABLE),
        Variant("llama.cpp", "bf16", "bfloat16", Storage(2, cache=2), _FLASH),
        Variant("llama.cpp", "q8_0", "int8", Storage(34 / 32, cache=2), _FLASH),
        Variant("llama.cpp", "q4_0", "int4", Storage(18 / 32, cache=2), _FLASH),
        Variant("ctranslate2", "float32", "float32", Storage(4), _MKL),
        Variant("ctranslate2", "int8", "int8", Storage(1, row=_SCALE), _MKL),
        Variant("onnxruntime", "float32", "float32", Storage(4)),
        Variant("onnxruntime", "int8-dynamic", "int8", Storage(1, row=_SCALE)),
        Variant("onnxruntime", "int8-blocks", "int8", Storage(1 + _SCALE / 32)),
        Variant("onnxruntime", "int4-blocks", "int4", Storage(0.5 + _SCALE / 32)),
        Variant("openvino", "float32", "float32", Storage(4)),
        Variant("openvino", "bfloat16", "bfloat16", Storage(2, cache=2)),
        Variant("openvino", "int8", "int8", Storage(1, row=_SCALE, cache=1)),
        Variant("openvino", "int4", "int4", Storage(0.5 + _SCALE / 128, cache=1)),
    )
}
"""Every column there is, gptx first, in the order of the tables."""


def select(peers: Iterable[str], precisions: Iterable[str]) -> list[Variant]:
    """The variants named by peers or ``peer:variant``, and all of gptx, of these precisions.

    Raises:
        ValueError: a name is not known; the message says which are.
    """
    chosen = {"gptx", *peers}
    known = {*PEERS, *VARIANTS}
    for name in chosen - known:
        names = ", ".join([*PEERS, *VARIANTS])
        raise ValueError(f"--peers: expected some of {names}, got {name!r}")
    precisions = set(precisions)
    for name in precisions - set(PRECISIONS):
        raise ValueError(f"--precisions: expected some of {', '.join(PRECISIONS)}, got {name!r}")
    return [
        variant
        for variant in VARIANTS.values()
        if variant.precision in precisions and chosen & {variant.peer, variant.key}
    ]


def reason_to_skip(entry: PeerEntry) -> str:
    """Why a peer cannot be measured here, or "" if it can."""
    missing = [name for name in entry.requires if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(missing)} ({entry.install})" if missing else ""
