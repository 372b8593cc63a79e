"""The training loop: steps, evaluation, checkpoints, samples.

A step is a function of the model, the optimizers and its number alone, so that a run that was
interrupted and resumed ends with the same bits on a CPU as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import numpy as np
import torch

from gptx.errors import TrainingError
from gptx.training import optim
from gptx.training.bpe import Encoder
from gptx.training.data import Batches, TokenSet
from gptx.training.evaluate import Evaluation, evaluate, sample
from gptx.training.export import write_weights
from gptx.training.loss import linear_cross_entropy
from gptx.training.model import GPT
from gptx.training.options import TrainOptions
from gptx.training.progress import Progress, clock
from gptx.training.state import TrainState, save_state

_SEED_STRIDE = 1_000_003  # keeps the dropout of neighbouring seeds apart
_AVERAGED_STEPS = 50
LOG = "log.jsonl"


@dataclass
class Position:
    """How far a run is: steps and seconds of all sittings, and the best model so far."""

    step: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    best_step: int = 0
    recent: list[float] = field(default_factory=list)


class Trainer:
    """One sitting of a run.

    Args:
        model: on its device, in float32.
        encoder: for samples.
        token_sets: the files.
        options: of the run; ``mix`` and ``precision`` are taken from the next two.
        mix: weight of each file.
        precision: "float32" or "bfloat16" (autocast; weights and optimizers stay float32).
        progress: where to show it.
    """

    def __init__(
        self,
        model: GPT,
        encoder: Encoder,
        token_sets: Sequence[TokenSet],
        options: TrainOptions,
        *,
        mix: Sequence[float],
        precision: str,
        progress: Progress,
    ) -> None:
        self.model = model
        self.options = options
        self.position = Position()
        self.encoder = encoder
        self._token_sets = token_sets
        self._mix = list(mix)
        self._precision = precision
        self._progress = progress
        self._out = Path(options.out)
        self._block_size = options.block_size or model.config.block_size
        self._device = model.wte.weight.device
        self._batches = Batches(token_sets, mix, self._block_size, options.seed)
        self._optimizers = optim.build_optimizers(model, options)
        self._hidden = torch.compile(model.hidden) if options.compile else model.hidden
        self._digests = [token_set.digest() for token_set in token_sets]
        self._times: deque[float] = deque(maxlen=_AVERAGED_STEPS)
        self._stop: signal.Signals | None = None

    def restore(self, state: TrainState) -> None:
        """Goes to where a checkpoint was saved."""
        self.model.load_state_dict(state.model)
        for optimizer, values in zip(self._optimizers, state.optimizers, strict=True):
            optimizer.load_state_dict(values)
        self.position = Position(state.step, state.seconds, state.best_loss, state.best_step)

    def run(self) -> int:
        """Trains to the end, or until SIGINT or SIGTERM, and saves in both cases.

        Returns:
            0, or 128 + the number of the signal that stopped it.

        Raises:
            TrainingError: the loss is not a finite number; the last checkpoint stands.
            ConvertError: a file cannot be written.
        """
        position, options = self.position, self.options
        started = time.monotonic() - position.seconds
        with self._signals():
            while not self._is_over() and self._stop is None:
                loss = self._step()
                position.step += 1
                position.seconds = time.monotonic() - started
                position.recent = [*position.recent[1 - _AVERAGED_STEPS :], loss]
                self._show()
                over = self._is_over()
                if over or position.step % options.eval_every == 0:
                    self._evaluate()
                if over or position.step % options.sample_every == 0:
                    self._sample()
                if over or position.step % options.save_every == 0:
                    self.save()
            if self._stop is not None:
                self.save()
        self._progress.close()
        return 0 if self._stop is None else 128 + self._stop

    def save(self) -> None:
        """Writes ``checkpoint.pt``."""
        state = TrainState(
            options=self.options.to_dict(),
            config=self.model.config.to_dict(),
            precision=self._precision,
            mix=self._mix,
            data=self._digests,
            step=self.position.step,
            seconds=self.position.seconds,
            best_loss=self.position.best_loss,
            best_step=self.position.best_step,
            model=self.model.state_dict(),
            optimizers=[optimizer.state_dict() for optimizer in self._optimizers],
        )
        save_state(self._out, state)

    def evaluate(self, *, whole: bool = False) -> Evaluation:
        """Losses on ``eval_rows`` held-out rows of each file, or on all of them in float32."""
        rows = None if whole else self.options.eval_rows
        with contextlib.nullcontext() if whole else self._autocast():
            return evaluate(self.model, self._token_sets, self._mix, self._block_size, rows)

    def _done(self) -> float:
        """The part of the run that is over."""
        last, minutes = self.options.last_step, self.options.minutes
        by_step = self.position.step / last if last else 0.0
        return max(by_step, self.position.seconds / (60 * minutes) if minutes else 0.0)

    def _is_over(self) -> bool:
        return self._done() >= 1

    def _step(self) -> float:
        """One optimizer step; returns its loss."""
        step, options = self.position.step, self.options
        torch.manual_seed(options.seed * _SEED_STRIDE + step)
        self.model.train()
        optim.set_lr(self._optimizers, optim.lr_factor(step, self._done(), options))
        total = torch.zeros((), device=self._device)
        for i in range(options.grad_accum):
            first = (step * options.grad_accum + i) * options.batch_size
            inputs, targets = map(self._to_device, self._batches.rows(first, options.batch_size))
            with self._autocast():
                x = self._hidden(inputs).flatten(0, 1)
                loss = linear_cross_entropy(x, self.model.head_weight, targets.flatten())
            loss = loss / options.grad_accum
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        value = total.item()
        self._check_finite("loss", value)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.grad_clip)
        for optimizer in self._optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return value

    def _evaluate(self) -> None:
        position = self.position
        evaluation = self.evaluate()
        train_loss = float(np.mean(position.recent))
        for file in evaluation.files:
            self._check_finite(f"held-out loss of {file.name}", file.loss)
        # Without held-out text there is nothing to choose by, and the newest model is kept.
        if not evaluation.files or evaluation.loss < position.best_loss:
            position.best_loss, position.best_step = evaluation.loss, position.step
            write_weights(self._out, self.model.canonical_tensors())
        self._progress.line(f"step {position.step:,}: train {train_loss:.4f}, {evaluation}")
        record = {
            "step": position.step,
            "seconds": round(position.seconds, 1),
            "train_loss": train_loss,
            "val_loss": evaluation.loss if evaluation.files else None,
            "files": {file.name: file.loss for file in evaluation.files},
        }
        with (self._out / LOG).open("a", encoding="utf-8") as log:
            log.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _check_finite(self, name: str, value: float) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"{name}: expected a finite number, got {value} at step {self.position.step}; "
                "lower lr, or raise warmup; the last checkpoint stands"
            )

    def _sample(self) -> None:
        with self._autocast():
            seed = self.options.seed + self.position.step
            text = sample(self.model, self.encoder, self.options.sample_prompt, seed=seed)
        self._progress.line(f"--- sample at step {self.position.step:,}\n{text}\n---")

    def _show(self) -> None:
        position, done = self.position, self._done()
        self._times.append(position.seconds)
        tokens = self.options.batch_size * self.options.grad_accum * self._block_size
        spent = self._times[-1] - self._times[0]
        rate = tokens * (len(self._times) - 1) / spent if spent else 0.0
        last = f"/{self.options.last_step:,}" if self.options.last_step else ""
        left = clock(position.seconds * (1 / done - 1))
        loss = float(np.mean(position.recent))
        text = f"step {position.step:,}{last}  loss {loss:.4f}  {rate:,.0f} tokens/s  {left} left"
        self._progress.bar(done, text)

    def _autocast(self) -> torch.autocast:
        enabled = self._precision == "bfloat16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(array).to(self._device)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the step in hand finish; the second one is not waited for."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in numbers}

        def stop(number: int, _frame: FrameType | None) -> None:
            self._stop = signal.Signals(number)
            self._progress.line(f"{self._stop.name}: saving after this step")
            signal.signal(number, previous[signal.Signals(number)])

        for number in previous:
            signal.signal(number, stop)
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
