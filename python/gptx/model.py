"""A loaded GPT: text in, text out, and the logits behind it.

>>> model = gptx.load("gpt2.gptx")
>>> print(model.generate("Once upon a time", max_new_tokens=50, seed=1))
>>> for piece in model.stream("The princess opened the door and"):
...     print(piece, end="", flush=True)
"""

from __future__ import annotations

import dataclasses
import numbers
import os
import re
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gptx import _core, modelfile
from gptx.config import GPTConfig
from gptx.errors import (
    ContextLengthError,
    DeviceError,
    GptxError,
    NonFiniteLogitsError,
    ParameterError,
    TokenIdError,
    TokenizeError,
)
from gptx.sampling import SamplingParams
from gptx.tokenizer import StopMatcher, Tokenizer, TokenizerSpec

Prompt = str | Sequence[int] | NDArray[np.integer]

_MAX_THREADS = 1024
_KV_CACHE_BYTES = 2 << 30


@dataclass(frozen=True)
class Generation:
    """What one request gave. ``str()`` of it is the prompt followed by the text.

    Attributes:
        prompt: the prompt as text.
        text: the continuation, without the prompt, without the stop string that ended it.
        token_ids: the generated ids, the end token excluded.
        finish_reason: "stop" (an end token or a stop string), "length" (``max_new_tokens`` or the
            context), "error", or of a stream "cancelled" or, so far, "unfinished".
        prompt_tokens, completion_tokens: how many ids the prompt and the continuation have.
        seed: the seed that gives this text again.
        error: why the request failed, where ``finish_reason`` is "error".
    """

    prompt: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    seed: int
    error: GptxError | None = None

    def __str__(self) -> str:
        return self.prompt + self.text


class Stream(Iterator[str]):
    """The pieces of a text as they are generated; leaving the loop cancels the rest.

    A piece never ends inside a character. Joined, the pieces are the text of `result`.
    """

    def __init__(self, reply: _Reply) -> None:
        self._reply = reply

    def __next__(self) -> str:
        piece = ""
        while not piece:
            if self._reply.finished:
                self._reply.release()
                if self._reply.error is not None:
                    raise self._reply.error
                raise StopIteration
            piece = "".join(self._reply.advance())
        return piece

    def __del__(self) -> None:
        self._reply.release()

    def close(self) -> None:
        """Cancels what has not been generated yet."""
        self._reply.cancel()

    @property
    def result(self) -> Generation:
        """The text so far; complete once the loop has ended."""
        return self._reply.generation()


class _Reply:
    """One request on its way: the engine's tokens become text, a stop string ends them."""

    def __init__(self, model: Model, prompt: Prompt, params: SamplingParams) -> None:
        ids = model._prompt_ids(prompt)
        self.error: GptxError | None = None
        self._engine = model._engine
        self._prompt = prompt if isinstance(prompt, str) else model._decode(ids)
        self._prompt_tokens = len(ids)
        self._seed = _random_seed() if params.seed is None else int(params.seed)
        self._decoder = model._tokenizer.decoder() if model._tokenizer else None
        self._stop = StopMatcher(params.stop)
        self._token_ids: list[int] = []
        self._text: list[str] = []
        self._finish = ""
        self._released = False
        self.request = self._engine.submit(
            ids,
            sampling={
                "repetition_penalty": params.repetition_penalty,
                "temperature": params.temperature,
                "top_k": params.top_k,
                "top_p": params.top_p,
                "min_p": params.min_p,
                "seed": self._seed,
            },
            max_new_tokens=params.max_new_tokens,
            min_new_tokens=params.min_new_tokens,
            end_tokens=model._end_tokens(params),
        )

    @property
    def finished(self) -> bool:
        return self._finish != ""

    def advance(self) -> list[str]:
        return [self.push(token, why) for _, token, why, *_ in self._engine.advance([self.request])]

    def push(self, token: int, finish: str) -> str:
        """Takes one event of the engine and returns the text that is certain now.

        A step may bring tokens behind a stop string; they are not part of the text.
        """
        if self.finished:
            return ""
        piece = ""
        if token >= 0:
            self._token_ids.append(token)
            piece = self._stop.push(self._decoder.push(token)) if self._decoder else ""
        if finish == "non_finite":
            position = self._prompt_tokens + len(self._token_ids)
            self.error = NonFiniteLogitsError(
                f"logits at position {position}: expected finite numbers, got NaN or infinity; "
                "the weights are damaged or overflow"
            )
            self._finish = "error"
        elif self._stop.stopped:
            self._finish = "stop"
        elif finish:
            self._finish = finish
            if self._decoder:
                piece += self._stop.push(self._decoder.finish()) + self._stop.finish()
                self._finish = "stop" if self._stop.stopped else finish
        self._text.append(piece)
        return piece

    def cancel(self) -> None:
        self._finish = self._finish or "cancelled"
        self.release()

    def release(self) -> None:
        if not self._released:
            self._released = True
            self._engine.release(self.request)

    def generation(self) -> Generation:
        return Generation(
            prompt=self._prompt,
            text="".join(self._text),
            token_ids=tuple(self._token_ids),
            finish_reason=self._finish or "unfinished",
            prompt_tokens=self._prompt_tokens,
            completion_tokens=len(self._token_ids),
            seed=self._seed,
            error=self.error,
        )


class Model:
    """A GPT on a device, made by `load`. Several threads may use it; their requests are batched.

    Attributes:
        config: the shape of the model.
        dtype: what the weights are stored as: "float32", "bfloat16" or "int8".
        path: the file it came from.
        precision: how it computes: "float32", "bfloat16", "int8" or "int8-fast".
        kv_cache_dtype: what keys and values are cached as.
        device: "cpu", or "cuda:0" and so on.
        threads: how many threads compute.
        isa: the instruction set of the kernels, or "sm_90" and so on.
        parity: the report of the conversion against torch, or None.
    """

    def __init__(
        self,
        source: modelfile.ModelFile,
        *,
        device: str,
        threads: int,
        isa: str,
        precision: str,
        kv_cache_dtype: str,
        kv_cache_bytes: int | None,
    ) -> None:
        self.config: GPTConfig = source.config
        self.dtype = source.dtype
        self.path = source.path
        self.parity = source.parity
        self.device = device
        self._source = source
        self._engine = _core.Engine(
            source.config.to_dict(),
            source.dtype,
            source.tensors,
            device=device.partition(":")[0],
            ordinal=int(device.partition(":")[2] or 0),
            cuda_library=_cuda_library(device),
            threads=threads,
            isa=isa,
            precision=precision,
            kv_cache_dtype=kv_cache_dtype,
            kv_cache_bytes=kv_cache_bytes,
        )
        self.precision: str = self._engine.precision
        self.kv_cache_dtype: str = self._engine.kv_cache_dtype
        self.threads: int = self._engine.threads
        self.isa: str = self._engine.isa
        _living_models.add(self)

    def __repr__(self) -> str:
        c = self.config
        where = f"{self.threads} threads" if self.device == "cpu" else self.device
        return (
            f"Model({self.path.name!r}, {c.n_params / 1e6:.1f}M parameters, n_layer={c.n_layer}, "
            f"n_head={c.n_head}, n_embd={c.n_embd}, {self.precision}, {self.isa}, {where})"
        )

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file. Raises TokenizeError if it has none."""
        if self._tokenizer is None:
            raise TokenizeError(
                f"{self.path.name}: this model has no tokenizer; give prompts as token ids, or "
                "convert again with --tokenizer"
            )
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Tokenizer | None:
        spec: TokenizerSpec | None = self._source.tokenizer
        return None if spec is None else Tokenizer(spec)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | None = None,
        **changes: object,
    ) -> Generation | list[Generation]:
        """Continues a prompt, or each of a list of prompts.

        Args:
            prompt: a str, a sequence of token ids, or a list of those, of any lengths. Each is its
                own request: its result is the same alone and in any company.
            params: how to sample; default `SamplingParams()`, which samples at temperature 0.8.
            **changes: fields of `SamplingParams` that replace those of ``params``.

        Returns:
            A `Generation`, or a list of them in the order of the prompts. In a list a request that
            failed carries its ``error``; a single one raises it.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: before anything runs.
            OutOfMemoryError: the KV cache cannot hold the request.
            NonFiniteLogitsError: the weights gave NaN or infinity.
        """
        params = _merged(params, changes)
        if _is_batch(prompt):
            return self._generate_all(list(prompt), params)
        result = self._generate_all([prompt], params)[0]
        if result.error is not None:
            raise result.error
        return result

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: object
    ) -> Stream:
        """Continues a prompt and yields the text piece by piece. Arguments as for `generate`."""
        if _is_batch(prompt):
            raise ParameterError("prompt", prompt, "one prompt: a str or a sequence of token ids")
        return Stream(_Reply(self, prompt, _merged(params, changes)))

    def logits(self, prompt: Prompt) -> NDArray[np.float32]:
        """The logits of every position, float32 ``[T, V]``: row t scores the token after ids[:t+1].

        Args:
            prompt: a str or 1 to ``block_size`` token ids.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: as for `generate`.
        """
        ids = self._ids(prompt)
        if len(ids) > self.config.block_size:
            raise ContextLengthError(len(ids), self.config.block_size)
        return self._engine.logits(ids)

    def _generate_all(self, prompts: list[Prompt], params: SamplingParams) -> list[Generation]:
        replies: list[_Reply] = []
        try:
            for prompt in prompts:
                replies.append(_Reply(self, prompt, params))
            running = {reply.request: reply for reply in replies}
            while running:
                for request, token, finish, *_ in self._engine.advance(list(running)):
                    reply = running.get(request)
                    if reply is None:
                        continue  # ended by an earlier event of this step
                    reply.push(token, finish)
                    if reply.finished:
                        reply.release()
                        del running[request]
        finally:
            for reply in replies:
                reply.release()
        return [reply.generation() for reply in replies]

    def _prompt_ids(self, prompt: Prompt) -> NDArray[np.int32]:
        ids = self._ids(prompt)
        limit = self.config.block_size - 1
        if len(ids) > limit:
            remedy = f"the context holds {self.config.block_size} and generation needs room for one"
            raise ContextLengthError(len(ids), limit, remedy)
        return ids

    def _ids(self, prompt: Prompt) -> NDArray[np.int32]:
        vocab_size = self.config.vocab_size
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        # bytes are a sequence of integers, but whoever passes them means text.
        if not isinstance(ids, Sequence | np.ndarray) or isinstance(ids, bytes | bytearray):
            raise ParameterError("prompt", prompt, "a str or a sequence of token ids")
        if len(ids) == 0:
            raise ParameterError("prompt", prompt, "at least one token")
        for index, token in enumerate(ids):
            integral = isinstance(token, numbers.Integral) and not isinstance(token, bool)
            if not integral or not 0 <= token < vocab_size:
                raise TokenIdError("prompt", index, token, vocab_size)
        return np.asarray(ids, dtype=np.int32)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids]) if self._tokenizer else ""

    def _end_tokens(self, params: SamplingParams) -> list[int]:
        ends = list(params.stop_token_ids)
        for index, token in enumerate(ends):
            if not isinstance(token, numbers.Integral) or not 0 <= token < self.config.vocab_size:
                raise TokenIdError("stop_token_ids", index, token, self.config.vocab_size)
        eos = self._source.generation.get("eos_token_id")
        if eos is None and self._tokenizer is not None:
            eos = self._tokenizer.eos_token_id
        if eos is not None and not params.ignore_eos:
            ends += [i for i in np.atleast_1d(eos).tolist() if i < self.config.vocab_size]
        return ends


def load(
    path: str | os.PathLike[str] | None = None,
    *,
    device: str = "cpu",
    threads: int | None = None,
    isa: str | None = None,
    precision: str | None = None,
    kv_cache_dtype: str | None = None,
    kv_cache_bytes: int | None = None,
    verify: bool = True,
) -> Model:
    """Loads a model.

    Args:
        path: a ``.gptx`` file, whose weights are used where they lie in the page cache; or a
            checkpoint that `gptx-convert` reads, converted in memory; None is the built-in demo.
        device: "cpu"; "cuda", or "cuda:1" for another GPU than the first; or "auto", which is
            "cuda" where that works and else "cpu", with one warning in the log that says why.
        threads: 1 to 1024; default the environment's GPTX_NUM_THREADS, else the least of the CPUs
            the process may use, its cgroup quota and the physical cores.
        isa: kernels to use, such as "scalar" or "avx2"; default GPTX_CPU_ISA, else the best. A
            name that cannot run here is refused with those that can.
        precision: how products are computed; default what the weights are stored as:
            "float32" float32 by float32; bfloat16 and int8 weights can be expanded to it;
            "bfloat16" weights and activations in bfloat16, summed in float32;
            "int8" weights in int8, activations in int16: as exact as the weights;
            "int8-fast" activations in 8 bits too: faster prompts where the CPU multiplies bytes,
            less exact. It computes with the same int8 files.
        kv_cache_dtype: "float32", "bfloat16" or "int8", the last with a scale for each head and
            position; default float32 with the precision float32, else bfloat16.
        kv_cache_bytes: most memory for cached keys and values; default a quarter of the machine's,
            at most 2 GiB, or of what the GPU has free. One context always fits. The CPU takes it as
            it is needed, a GPU at once.
        verify: check the checksum of every tensor.

    Raises:
        FileNotFoundError: there is no such file.
        ModelFileError: the file is damaged or not a model.
        ConvertError, UnsafeCheckpointError: the checkpoint does not make a GPT-2.
        ParameterError, UnsupportedError, DeviceError: an argument is not possible here.
    """
    if not isinstance(device, str) or not re.fullmatch(r"cpu|auto|cuda(:\d{1,3})?", device):
        raise ParameterError("device", device, "one of cpu, cuda, cuda:N, auto")
    count = _thread_count(threads)
    if kv_cache_bytes is not None and (type(kv_cache_bytes) is not int or kv_cache_bytes < 0):
        raise ParameterError("kv_cache_bytes", kv_cache_bytes, "a number of bytes")
    for name, value in (("precision", precision), ("kv_cache_dtype", kv_cache_dtype)):
        if value is not None and not isinstance(value, str):
            raise ParameterError(name, value, "a str or None")
    if device.startswith("cuda") and isa is not None:
        raise ParameterError("isa", isa, f"None with device={device!r}: it is of the CPU")
    source = _open(Path(demo_path() if path is None else path), verify=verify)
    options = {"precision": precision or "", "kv_cache_dtype": kv_cache_dtype or ""}
    if device != "cpu":
        name = "cuda:0" if device in ("auto", "cuda") else device
        try:
            return Model(
                source, device=name, threads=0, isa="", kv_cache_bytes=kv_cache_bytes, **options
            )
        except DeviceError as error:
            if device != "auto":
                raise
            _warn_once(f"device='auto' is the CPU here: {error}")
    return Model(
        source,
        device="cpu",
        threads=count,
        isa=os.environ.get("GPTX_CPU_ISA", "") if isa is None else isa,
        kv_cache_bytes=_cpu_kv_cache_bytes() if kv_cache_bytes is None else kv_cache_bytes,
        **options,
    )


def _cuda_library(device: str) -> str:
    if device == "cpu":
        return ""
    from gptx import cuda

    return str(cuda.library_path())


def _cpu_kv_cache_bytes() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(memory // 4, _KV_CACHE_BYTES)


_warned: set[str] = set()


def _warn_once(text: str) -> None:
    if text not in _warned:
        import logging

        _warned.add(text)
        logging.getLogger("gptx").warning(text)


def generate(
    prompt: Prompt | Sequence[Prompt],
    params: SamplingParams | None = None,
    *,
    model: str | os.PathLike[str] | Model | None = None,
    **changes: object,
) -> Generation | list[Generation]:
    """`Model.generate` by a model that stays loaded: the built-in demo unless told otherwise.

    Args:
        prompt, params, **changes: as for `Model.generate`.
        model: a path or a `Model`; default the environment's GPTX_MODEL, else the demo.
    """
    if not isinstance(model, Model):
        path = model or os.environ.get("GPTX_MODEL") or demo_path()
        model = _cached(Path(path))
    return model.generate(prompt, params, **changes)


def _open(path: Path, *, verify: bool) -> modelfile.ModelFile:
    if path.is_file() and modelfile.is_model_file(path):
        return modelfile.read(path, verify=verify)
    from gptx.convert import convert_in_memory

    return convert_in_memory(path)


def demo_path() -> Path:
    return Path(__file__).parent / "demo" / "demo.gptx"


def _thread_count(threads: int | None) -> int:
    """0 lets the core decide."""
    name, value = "threads", threads
    if threads is None:
        text = os.environ.get("GPTX_NUM_THREADS", "")
        if not text:
            return 0
        name, value = "GPTX_NUM_THREADS", int(text) if text.isdecimal() else text
    if type(value) is not int or not 1 <= value <= _MAX_THREADS:
        raise ParameterError(name, value, f"an integer from 1 to {_MAX_THREADS}")
    return value


def _random_seed() -> int:
    return int.from_bytes(os.urandom(8), "little")


def _is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts; anything else is one prompt, or wrong."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        return False
    return any(isinstance(part, str | Sequence | np.ndarray) for part in prompt)


def _merged(params: SamplingParams | None, changes: dict[str, object]) -> SamplingParams:
    known = [field.name for field in dataclasses.fields(SamplingParams)]
    for name in changes:
        if name not in known:
            raise ParameterError(name, changes[name], "one of the parameters " + ", ".join(known))
    if params is None:
        return SamplingParams(**changes)  # type: ignore[arg-type]
    if not isinstance(params, SamplingParams):
        raise ParameterError("params", params, "a SamplingParams")
    return dataclasses.replace(params, **changes)


_cache: dict[tuple[Path, int], Model] = {}
_cache_lock = threading.Lock()


def _cached(path: Path) -> Model:
    """The model of a path, loaded once for each version of the file."""
    key = (path.resolve(), path.stat().st_mtime_ns)
    with _cache_lock:
        if key not in _cache:
            _cache[key] = load(path)
        return _cache[key]


_living_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    global _cache_lock
    _cache_lock = threading.Lock()
    for model in list(_living_models):
        model._engine.reset_after_fork()


os.register_at_fork(after_in_child=_after_fork)
