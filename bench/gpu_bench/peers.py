"""torch beside gptx: the same weights, a cache of fixed size, greedy tokens, nothing else.

    eager       one kernel after another
    graph       the same kernels, a whole step as one CUDA graph
    compiled    each block through torch.compile, a whole step as one CUDA graph
    int8        the same with int8 weights, as gpt-fast quantizes them

The cache of a peer is as long as its sequences become, and its tokens stay on the device from step
to step: what a serving loop adds is not counted against it.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from gptx.config import GPTConfig
from gpu_bench import driving
from gpu_bench.driving import DecodeCase, Sample
from gpu_bench.torch_gpt import Block, Gpt

LARGEST_LOSS = 0.25
"""How much lower than its own choice the float32 reference may rate a greedy token of a peer, in
root mean squares of its logits: rounding to bfloat16 explains so much. Tokens of another model are
rated about four lower."""


@dataclasses.dataclass(frozen=True)
class Peer:
    """One way to run torch.

    Attributes:
        precision: "bfloat16", or "int8" for the weights of the linear layers.
        graph: whether a decode step is one CUDA graph.
        compiled: whether its parts go through torch.compile.
        attention: how decode steps attend. "math" is matmul and softmax, which the compiler can
            fuse; "fused" is the kernel torch chooses. Where both are named, the faster is kept.
    """

    precision: str = "bfloat16"
    graph: bool = False
    compiled: bool = False
    attention: tuple[str, ...] = ("fused",)


PEERS = {
    "eager": Peer(),
    "graph": Peer(graph=True),
    "compiled": Peer(graph=True, compiled=True, attention=("math", "fused")),
    "int8": Peer("int8", graph=True, compiled=True, attention=("math",)),
}


class Decoder:
    """Sequences of one length, decoded greedily on static buffers.

    Args:
        positions: S, how many the sequences may have at the end.
        attention: as of `Peer`.
    """

    def __init__(
        self, gpt: Gpt, batch: int, positions: int, peer: Peer, attention: str = "fused"
    ) -> None:
        device = gpt.wte.device
        self._gpt = gpt
        self._cache = gpt.make_cache(batch, -(-positions // 16) * 16)  # as its kernels like it
        self._columns = torch.arange(self._cache[0].keys.shape[2], device=device)
        self._tokens = torch.zeros(batch, 1, dtype=torch.long, device=device)  # [B, 1]
        self._position = torch.zeros(1, dtype=torch.long, device=device)
        self._history = torch.zeros(batch, positions + 1, dtype=torch.long, device=device)
        self._attention = attention
        self._begin: Callable[..., Any] = _begin
        self._block: Callable[..., Any] = Block.forward
        self._end: Callable[..., Any] = _end
        if peer.compiled:
            # Blocks have one shape, so that one is compiled for all; of a single row, int8 weights
            # are expanded inside the product, of more only where the product is tuned too.
            tuned = "max-autotune-no-cudagraphs" if peer.precision == "int8" and batch > 1 else None
            self._begin, self._block, self._end = (
                torch.compile(part, dynamic=False, fullgraph=True, mode=tuned)
                for part in (_begin, Block.forward, _end)
            )
        self.step = self._captured() if peer.graph else self._step

    def prefill(self, prompts: Tensor) -> None:
        """Computes prompts [B, T] and chooses the first token of each."""
        n = prompts.shape[1]
        positions = torch.arange(n, device=prompts.device)
        x, h = self._gpt.embed(prompts, positions)
        for block, cache in zip(self._gpt.blocks, self._cache, strict=True):
            x, h = block(x, h, cache, positions, None)
        self._tokens.copy_(self._gpt.choose(h))
        self._position.fill_(n)
        self._history[:, n] = self._tokens[:, 0]

    def tokens(self, begin: int, n: int) -> list[list[int]]:
        """The n tokens of each sequence from a position on."""
        return self._history[:, begin : begin + n].tolist()

    def _step(self) -> None:
        """One more token of each sequence; everything it needs is on the device."""
        x, h, mask = self._begin(self._gpt, self._tokens, self._position, self._columns)
        with _attending(self._attention):
            for block, cache in zip(self._gpt.blocks, self._cache, strict=True):
                x, h = self._block(block, x, h, cache, self._position, mask)
        self._end(self._gpt, h, self._tokens, self._position, self._history)

    def _captured(self) -> Callable[[], None]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and lets libraries make what they keep
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay


def _begin(
    gpt: Gpt, tokens: Tensor, position: Tensor, columns: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What the first block takes, and which of the cache's columns [S] the tokens see."""
    x, h = gpt.embed(tokens, position)
    return x, h, (columns <= position)[None, None, None]


def _end(gpt: Gpt, h: Tensor, tokens: Tensor, position: Tensor, history: Tensor) -> None:
    """Chooses the next tokens, in place."""
    tokens.copy_(gpt.choose(h))
    position.add_(1)
    history.index_copy_(1, position, tokens)


def _attending(attention: str) -> AbstractContextManager[None]:
    return sdpa_kernel(SDPBackend.MATH) if attention == "math" else nullcontext()


def synchronize(gpt: Gpt) -> None:
    if gpt.wte.is_cuda:
        torch.cuda.synchronize()


def time_decode(
    gpt: Gpt, config: GPTConfig, peer: Peer, case: DecodeCase, repeats: int
) -> tuple[list[Sample], list[int], str]:
    """Samples of the faster way to attend, the tokens of the first sequence, and that way."""
    tries = []
    for attention in peer.attention:
        decoder = Decoder(gpt, case.batch, case.prompt + case.new_tokens, peer, attention)
        samples, tokens = _generate(gpt, config, decoder, case, repeats)
        tries.append((samples, tokens, attention))
        del decoder  # and with it the cache
        if peer.compiled:
            torch.compiler.reset()  # each shape is compiled for itself
        if gpt.wte.is_cuda:
            torch.cuda.empty_cache()
    return min(tries, key=lambda found: sum(sample.seconds for sample in found[0]))


def _generate(
    gpt: Gpt, config: GPTConfig, decoder: Decoder, case: DecodeCase, repeats: int
) -> tuple[list[Sample], list[int]]:
    """As `driving.time_decode`: as many steps for each sample, the first generation not counted."""
    at_once = driving.STEPS_AT_ONCE
    prompts = np.stack(driving.random_prompts(config, [case.prompt] * case.batch))
    ids = torch.from_numpy(prompts).to(gpt.wte.device, torch.long)
    samples = []
    for repeat in range(1 + repeats):
        decoder.prefill(ids)
        for _ in range(case.steps // at_once):
            synchronize(gpt)
            begin = time.perf_counter()
            for _ in range(at_once):
                decoder.step()
            synchronize(gpt)
            if repeat > 0:
                samples.append(Sample(at_once * case.batch, time.perf_counter() - begin))
    return samples, decoder.tokens(case.prompt, case.new_tokens)[0]


def time_prefill(
    gpt: Gpt, config: GPTConfig, peer: Peer, tokens: int, repeats: int
) -> list[Sample]:
    """Samples of one prompt, to its first token on the host."""
    block: Callable[..., Any] = Block.forward
    if peer.compiled:
        block = torch.compile(Block.forward, dynamic=False, fullgraph=True)
    cache = gpt.make_cache(1, tokens)
    samples = []
    for repeat in range(3 + repeats):
        prompt = driving.random_prompts(config, [tokens], seed=repeat)[0]
        synchronize(gpt)
        begin = time.perf_counter()
        ids = torch.from_numpy(prompt).to(gpt.wte.device, torch.long)[None]
        positions = torch.arange(tokens, device=ids.device)
        x, h = gpt.embed(ids, positions)
        for module, layer in zip(gpt.blocks, cache, strict=True):
            x, h = block(module, x, h, layer, positions, None)
        int(gpt.choose(h))
        if repeat >= 3:
            samples.append(Sample(tokens, time.perf_counter() - begin))
    if peer.compiled:
        torch.compiler.reset()
    return samples


def loss(prompt: NDArray[np.int32], tokens: list[int], reference: Gpt) -> float:
    """How much lower than its best choice the reference rates the worst of greedy tokens, in root
    mean squares of its logits."""
    sequence = np.concatenate([prompt, np.asarray(tokens, np.int32)])
    logits = reference.logits(sequence)
    rows = logits[-1 - len(tokens) : -1]
    chosen = torch.tensor(tokens, device=rows.device)[:, None]
    lost = rows.amax(dim=1) - rows.gather(1, chosen)[:, 0]
    return float(lost.max() / logits.square().mean().sqrt())


def measure(
    config: GPTConfig,
    tensors: Mapping[str, NDArray[np.float32]],
    name: str,
    cases: list[DecodeCase],
    prefill: int,
    device: str,
) -> Iterator[dict[str, Any]]:
    """A record of each case, and of a prompt of ``prefill`` tokens, as soon as it is measured.

    Args:
        tensors: canonical, the values that gptx computes with.
        device: "cuda", or "cpu" to try it out where nothing is compiled.
    """
    peer = PEERS[name]
    if peer.compiled:
        inductor = importlib.import_module("torch._inductor.config")
        inductor.coordinate_descent_tuning = True  # for products of one row
    gpt = Gpt(config, tensors, device, torch.bfloat16, int8=peer.precision == "int8")
    reference = Gpt(config, tensors, device)
    with torch.no_grad():
        for case in cases:
            samples, tokens, attention = time_decode(gpt, config, peer, case, repeats=2)
            prompt = driving.random_prompts(config, [case.prompt])[0]
            found = loss(prompt, tokens, reference)
            record = {"part": "decode", "case": case, "attention": attention, "loss": found}
            if found <= LARGEST_LOSS:
                yield record | {"samples": samples}
            else:
                yield record | {"failed": f"its tokens are not those of the model: {found:.2f}"}
        if not peer.graph or peer.compiled:
            samples = time_prefill(gpt, config, peer, prefill, repeats=10)
            yield {"part": "prefill", "tokens": prefill, "samples": samples}
