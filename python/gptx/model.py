"""A loaded GPT: text in, text out, and the logits behind it.

>>> model = gptx.load("gpt2.gptx")
>>> print(model.generate("Once upon a time", max_new_tokens=50, seed=1))
>>> for piece in model.stream("The princess opened the door and"):
...     print(piece, end="", flush=True)
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from gptx import _core, jobs, modelfile, requests
from gptx.branch import Branch
from gptx.config import GPTConfig
from gptx.errors import (
    ContextLengthError,
    ParameterError,
    TokenizeError,
)
from gptx.generation import Generation
from gptx.sampling import SamplingParams, with_changes
from gptx.tokenizer import Tokenizer, TokenizerSpec

if TYPE_CHECKING:
    from gptx.background import AsyncStream, Background
    from gptx.beams import BeamStream
    from gptx.classification import Classification
    from gptx.scoring import Choice, TokenScores

Prompt = str | Sequence[int] | NDArray[np.integer]

_KV_BLOCK = 64  # positions


class Stream(Iterator[str]):
    """The pieces of a text as they are generated; leaving the loop cancels the rest.

    A piece never ends inside a character. Joined, the pieces are the text of `result`.
    """

    def __init__(self, job: jobs.Job) -> None:
        self._job = job
        self._reader = threading.Lock()

    def __next__(self) -> str:
        with self._reader:
            piece = self._job.pieces()
            while not piece:
                if self._job.finished:
                    self._job.close()
                    if self._job.error is not None:
                        raise self._job.error
                    raise StopIteration
                jobs.step(self._job.task.engine, [self._job])
                piece = self._job.pieces()
            return piece

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._job.close()

    def close(self) -> None:
        """Cancels what has not been generated yet."""
        self._job.cancel()

    @property
    def result(self) -> Generation:
        """The text so far; complete once the loop has ended."""
        return self._job.generation()


class Plan(NamedTuple):
    """Memory in bytes: weights (on the CPU those of the mapped file, which processes share), the KV
    cache, and what a step works in.
    """

    weights: int
    kv_cache: int
    workspace: int

    @property
    def total(self) -> int:
        return sum(self)


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
        isa: the instruction set of the kernels, or of a GPU, such as
            "sm_90 wgmma": its architecture, and what multiplies many rows there.
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
        prefix_cache_bytes: int,
        step_tokens: int,
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
            prefix_cache_bytes=prefix_cache_bytes,
            step_tokens=step_tokens,
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
        return None if spec is None else Tokenizer(spec, self.config.vocab_size)

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **changes: object,
    ) -> Generation | list[Generation]:
        """Continues a prompt, or each of a list of prompts.

        Args:
            prompt: a str, a sequence of token ids, or a list of those, of any lengths. Each is its
                own request: its result is the same alone and in any company.
            params: how to sample; default `SamplingParams()`, which samples at temperature 0.8. Of
                a list of prompts each may have its own, in a list of them.
            **changes: fields of `SamplingParams` that replace those of ``params``.

        Returns:
            A `Generation`, or a list of them in the order of the prompts. In a list a request that
            failed carries its ``error``; a single one raises it.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: before anything runs.
            OutOfMemoryError: the KV cache cannot hold the request.
            NonFiniteLogitsError: the weights gave NaN or infinity.
        """
        prompts, batch = _as_batch(prompt)
        found = self._generate_all(prompts, _merged_all(prompts, params, changes), batch=batch)
        if batch:
            return found
        result = found[0]
        if result.error is not None:
            raise result.error
        return result

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: object
    ) -> Stream:
        """Continues a prompt and yields the text piece by piece. Arguments as for `generate`, but
        ``n``.

        Of beams, a piece is what all of them have in common and none can take back.
        """
        return Stream(self._start_stream(prompt, with_changes(params, changes)))

    async def agenerate(
        self,
        prompt: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        **changes: object,
    ) -> Generation | list[Generation]:
        """`generate` for asyncio: the event loop goes on meanwhile, and requests of all tasks share
        each step. Cancelling the task cancels them.
        """
        from gptx import background

        prompts, batch = _as_batch(prompt)
        started = self._start_all(prompts, _merged_all(prompts, params, changes), batch=batch)
        found = await background.finish(self._background, started)
        if batch:
            return found
        if found[0].error is not None:
            raise found[0].error
        return found[0]

    def astream(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: object
    ) -> AsyncStream:
        """`stream` for asyncio: ``async for piece in model.astream(...)``.

        Raises:
            UnsupportedError: no event loop runs here.
        """
        from gptx import background

        background.check_loop()
        job = self._start_stream(prompt, with_changes(params, changes))
        return background.AsyncStream(self._background, job)

    @cached_property
    def _background(self) -> Background:
        from gptx import background

        return background.Background(self._engine)

    def plan(self, batch: int = 1, context: int | None = None) -> Plan:
        """The memory that texts generated at the same time take, in bytes; nothing is allocated.

        Args:
            batch: how many texts.
            context: tokens of each, prompt and continuation; default ``block_size``.

        Raises:
            ParameterError: one of them is out of range.
        """
        size = self.config.block_size
        context = size if context is None else context
        for name, value, limit in (("batch", batch, 2**31 - 1), ("context", context, size)):
            if type(value) is not int or not 1 <= value <= limit:
                raise ParameterError(name, value, f"an integer from 1 to {limit}")
        weights = sum(tensor.nbytes for tensor in self._source.tensors.values())
        kv_cache = batch * -(-context // _KV_BLOCK) * self._engine.kv_block_bytes
        return Plan(weights, kv_cache, self._engine.workspace_bytes)

    def beams(
        self, prompt: Prompt, params: SamplingParams | None = None, **changes: object
    ) -> BeamStream:
        """Searches with ``num_beams`` and yields after every step what the beams are, a
        `gptx.beams.BeamStep`, for a display that may replace what it showed. Arguments as for
        `generate`, whose result is the stream's ``result`` at its end.

        Raises:
            ParameterError: ``num_beams`` is 1; and as for `generate`.
        """
        from gptx.beams import BeamJob, BeamStream

        _check_single(prompt)
        params = with_changes(params, changes)
        if params.num_beams < 2:
            raise ParameterError("num_beams", params.num_beams, "at least 2")
        return BeamStream(BeamJob(self._task(prompt, params)))

    def branch(self, prompt: Prompt, *, logits: int = 1, hidden: bool = False) -> Branch:
        """A text in the KV cache that the caller controls: feed, fork, truncate.

        Args:
            prompt: a str or 1 to ``block_size`` token ids.
            logits: of how many of its last tokens the logits are wanted.
            hidden: keep the hidden states beside the logits.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: as for `generate`.
        """
        ids = self._ids(prompt)
        if len(ids) > self.config.block_size:
            raise ContextLengthError(len(ids), self.config.block_size)
        if type(logits) is not int or not 1 <= logits <= len(ids):
            raise ParameterError("logits", logits, f"an integer from 1 to {len(ids)}")
        request = self._engine.submit(
            ids, sampling={}, max_new_tokens=1, held=True, hidden=hidden, wanted=logits
        )
        branch = Branch(self, request, hidden=hidden)
        branch._compute()
        return branch

    def restore(self, path: str | os.PathLike[str]) -> Branch:
        """The branch that `Branch.save` wrote, with the logits of its last token.

        Raises:
            FileNotFoundError: there is no such file.
            ModelFileError: it is damaged or no session.
            ParameterError: it was saved with another model, precision or device.
        """
        from gptx import session

        return session.restore(self, path)

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

    def hidden_states(self, prompt: Prompt) -> NDArray[np.float32]:
        """The residual stream, float32 ``[n_layer + 1, T, C]``: the embeddings, the state behind
        each block but the last, that behind the final norm; as transformers' ``hidden_states``.

        Args:
            prompt: a str or 1 to ``block_size`` token ids.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: as for `generate`.
        """
        ids = self._ids(prompt)
        if len(ids) > self.config.block_size:
            raise ContextLengthError(len(ids), self.config.block_size)
        return self._engine.states(ids)

    def logprobs(
        self, prompt: Prompt | Sequence[Prompt], *, top: int = 0, bos: bool = False
    ) -> TokenScores | list[TokenScores]:
        """What the model says of each token of a text, or of each of a list of texts.

        Args:
            prompt: a str or 1 to ``block_size + 1`` token ids, or a list of those.
            top: report so many of the most likely tokens in each place, 0 to 100.
            bos: put the end-of-text token in front, so that the first token of a text has a
                probability too; it is then the first of ``token_ids``.

        Raises:
            ParameterError, TokenIdError, TokenizeError, ContextLengthError: before anything runs.
            NonFiniteLogitsError: the weights gave NaN or infinity.
        """
        from gptx import scoring

        if _is_batch(prompt):
            return scoring.logprobs(self, list(prompt), top=top, bos=bos)
        return scoring.logprobs(self, [prompt], top=top, bos=bos)[0]

    def score(
        self, texts: Prompt | Sequence[Prompt], *, prompt: Prompt | None = None, bos: bool = False
    ) -> float | list[float]:
        """The log-probability of a text, or of each of a list of texts.

        Args:
            texts: as for `logprobs`. The first token of a text has no probability of its own,
                unless ``bos`` puts the end-of-text token in front of it.
            prompt: what the texts continue; their log-probability is then that of what stands
                behind it, and the prompt is computed once.

        Raises: as `logprobs`.
        """
        from gptx import scoring

        if _is_batch(texts):
            return scoring.score(self, list(texts), prompt=prompt, bos=bos)
        return scoring.score(self, [texts], prompt=prompt, bos=bos)[0]

    def choose(
        self,
        prompt: Prompt,
        options: Sequence[Prompt],
        *,
        normalize: str = "sum",
        bos: bool = False,
    ) -> Choice:
        """The option that most likely continues a prompt, which is computed once.

        Args:
            prompt: a str or token ids.
            options: what may come next, spaces included: ``[" yes", " no"]``.
            normalize: compare the "sum" of the log-probabilities of an option's tokens, their
                "mean", or the sum for each of its UTF-8 "bytes".
            bos: put the end-of-text token in front of the prompt.

        Raises: as `logprobs`.
        """
        from gptx import scoring

        return scoring.choose(self, prompt, options, normalize=normalize, bos=bos)

    def perplexity(self, text: Prompt, *, stride: int | None = None, bos: bool = False) -> float:
        """exp of the mean surprisal of the tokens of a text of any length of at least two tokens.

        Args:
            text: a str or token ids.
            stride: windows of ``block_size`` tokens begin so far apart; of each, the tokens that
                the one before did not reach count. Default half of ``block_size``; smaller gives
                each token more context and takes longer. As transformers' documentation has it.
            bos: put the end-of-text token in front.

        Raises: as `logprobs`.
        """
        from gptx import scoring

        return scoring.perplexity(self, text, stride=stride, bos=bos)

    def embed(
        self, texts: Prompt | Sequence[Prompt], *, pooling: str = "mean", normalize: bool = False
    ) -> NDArray[np.float32]:
        """The final hidden state of a text ``[C]``, or of each of a list ``[n, C]``, float32.

        Args:
            texts: a str or 1 to ``block_size`` token ids, or a list of those.
            pooling: the "mean" over the tokens, or the "last" token's, which has read them all.
            normalize: scale to length 1.

        Raises: as `logprobs`.
        """
        from gptx import scoring

        batch = list(texts) if _is_batch(texts) else [texts]
        found = scoring.embed(self, batch, pooling=pooling, normalize=normalize)
        return found if _is_batch(texts) else found[0]

    def classify(self, texts: Prompt | Sequence[Prompt]) -> Classification | list[Classification]:
        """The label of a text, or of each of a list, by the model's classification head.

        Args:
            texts: a str or 1 to ``block_size`` token ids, or a list of those. The template of a
                prompt, if the head was trained with one, is the caller's.

        Raises:
            UnsupportedError: the model has no head; `gptx.tasks.classify` works with any model.
            Others: as `logprobs`.
        """
        from gptx import classification

        batch = list(texts) if _is_batch(texts) else [texts]
        found = [
            classification.classification(self.config.labels, row, self.config.problem_type)
            for row in classification.class_logits(self, batch)
        ]
        return found if _is_batch(texts) else found[0]

    def _generate_all(
        self, prompts: list[Prompt], params: list[SamplingParams], *, batch: bool
    ) -> list[Generation]:
        started = self._start_all(prompts, params, batch=batch)
        try:
            while running := [job for job in started if not job.finished]:
                jobs.step(self._engine, running)
        finally:
            for job in started:
                job.close()
        return [job.generation() for job in started]

    def _start_all(
        self, prompts: list[Prompt], params: list[SamplingParams], *, batch: bool
    ) -> list[jobs.Job]:
        started: list[jobs.Job] = []
        try:
            names = [f"prompt[{i}]" for i in range(len(prompts))] if batch else ["prompt"]
            for task in list(map(self._task, prompts, params, names)):
                started.append(jobs.start(task))
        except BaseException:
            for job in started:
                job.close()
            raise
        return started

    def _start_stream(self, prompt: Prompt, params: SamplingParams) -> jobs.Job:
        _check_single(prompt)
        for name in ("n", "best_of"):
            if getattr(params, name) not in (1, None):
                raise ParameterError(name, getattr(params, name), "1 for a stream")
        return jobs.start(self._task(prompt, params))

    def _task(self, prompt: Prompt, params: SamplingParams, name: str = "prompt") -> jobs.Task:
        ids = self._ids(prompt, name)
        limit = self.config.block_size - 1
        if len(ids) > limit and params.context == "stop":
            remedy = f"the context holds {self.config.block_size} and generation needs room for one"
            remedy += '; context="slide" goes on past it'
            raise ContextLengthError(len(ids), limit, remedy, param=name)
        text = prompt if isinstance(prompt, str) else self._decode(ids)
        seed = jobs.random_seed() if params.seed is None else int(params.seed)
        return jobs.Task(self, ids, text, params, seed)

    def _ids(self, prompt: Prompt, name: str = "prompt") -> NDArray[np.int32]:
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        if hasattr(ids, "__array__"):  # of numpy, or of another library
            ids = np.asarray(ids)
        # bytes are a sequence of integers, but whoever passes them means text.
        many = isinstance(ids, Sequence) or (isinstance(ids, np.ndarray) and ids.ndim == 1)
        if not many or isinstance(ids, bytes | bytearray):
            raise ParameterError(name, prompt, "a str or a sequence of token ids")
        if len(ids) == 0:
            raise ParameterError(name, prompt, "at least one token")
        return np.asarray(requests.checked_ids(self, name, ids), dtype=np.int32)

    def _decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids]) if self._tokenizer else ""


def _cuda_library(device: str) -> str:
    if device == "cpu":
        return ""
    from gptx import cuda

    return str(cuda.library_path())


def _is_batch(prompt: object) -> bool:
    """Whether this is a list of prompts; anything else is one prompt, or wrong."""
    if isinstance(prompt, str | bytes) or not isinstance(prompt, Sequence):
        return False
    return any(isinstance(part, str | Sequence | np.ndarray) for part in prompt)


def _check_single(prompt: object) -> None:
    if _is_batch(prompt):
        raise ParameterError("prompt", prompt, "one prompt: a str or a sequence of token ids")


def _as_batch(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """The prompts, and whether they came as a list."""
    batch = _is_batch(prompt)
    return (list(prompt) if batch else [prompt]), batch  # type: ignore[list-item]


def _merged_all(
    prompts: list[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None,
    changes: dict[str, object],
) -> list[SamplingParams]:
    """The parameters of each prompt."""
    if isinstance(params, Sequence):
        if len(params) != len(prompts):
            got = f"{len(params)} of them"
            raise ParameterError("params", got, f"one SamplingParams for each of {len(prompts)}")
        return [with_changes(one, changes) for one in params]
    return [with_changes(params, changes)] * len(prompts)


_living_models: weakref.WeakSet[Model] = weakref.WeakSet()


def _after_fork() -> None:
    for model in list(_living_models):
        model._engine.reset_after_fork()


os.register_at_fork(after_in_child=_after_fork)
