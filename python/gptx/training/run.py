"""A training run from its files to its files: read, train, choose the best model, convert."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path

import torch

from gptx.checkpoints import NO_TOKENIZER, read_checkpoint
from gptx.checkpoints.tokenizer_files import from_chars
from gptx.config import GPTConfig
from gptx.convert import convert
from gptx.errors import ParameterError
from gptx.training import optim
from gptx.training.bpe import Encoder, load_tokenizer
from gptx.training.data import TokenSet, read_documents, tokenize_file
from gptx.training.evaluate import Evaluation
from gptx.training.export import WEIGHTS, write_description, write_json
from gptx.training.model import GPT
from gptx.training.options import CHANGEABLE, TrainOptions
from gptx.training.progress import Progress
from gptx.training.start import from_checkpoint, from_scratch
from gptx.training.state import load_state
from gptx.training.trainer import Trainer

MODEL_FILE = "model.gptx"
SUMMARY = "training.json"


def train(options: TrainOptions, progress: Progress) -> int:
    """Runs training from step 0 and leaves a loadable folder and a ``.gptx`` file in it.

    Args:
        options: what to do.
        progress: where to show it.

    Returns:
        0, or 128 + the number of the signal that stopped it; then `resume` goes on.

    Raises:
        ParameterError: an option does not fit the data, the checkpoint or the folder.
        OSError: a file cannot be read.
        TrainingError: the loss became infinite or NaN.
    """
    out = Path(options.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ParameterError("out", options.out, "a new or empty folder, or resume")
    device = _prepare(options)
    documents = [read_documents(Path(path)) for path in options.data]
    start = from_checkpoint(options) if options.init else from_scratch(options, documents)
    for note in start.notes:
        progress.line(note)
    token_sets = _tokenize(options, documents, start.encoder, progress)
    torch.manual_seed(options.seed)
    model = GPT(start.config, dropout=options.dropout)
    if start.tensors is not None:
        model.load_canonical(start.tensors)
    mix = _mixture(options, token_sets)
    precision = optim.choose_precision(options.precision, device)
    trainer = Trainer(
        model.to(device), start.encoder, token_sets, options,
        mix=mix, precision=precision, progress=progress,
    )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    write_description(out, start.config, start.encoder, options.dropout)
    trainer.save()
    progress.line(f"{start.config.n_params:,} parameters, {precision} on {device}")
    if start.tensors is not None:
        progress.line(f"before the first step: {trainer.evaluate()}")
    return _run(trainer, token_sets, progress)


def resume(out: str, changes: Mapping[str, object], progress: Progress) -> int:
    """Goes on from ``checkpoint.pt`` as if there had been no interruption.

    Args:
        out: the folder of the run.
        changes: options given again; those of `CHANGEABLE` and ``data`` (the same texts elsewhere)
            may differ from the run's.
        progress: where to show it.

    Raises:
        ParameterError: there is no run, or an option or the data would make it a different run.
        ConvertError: the checkpoint is damaged.
    """
    state = load_state(Path(out))
    saved = TrainOptions.from_dict(state.options)
    options = replace(saved, **{**changes, "out": out})  # type: ignore[arg-type]
    for field in fields(options):
        old, new = getattr(saved, field.name), getattr(options, field.name)
        if old != new and field.name not in CHANGEABLE | {"data", "out"}:
            raise ParameterError(field.name, new, f"{old!r}, as in the run to resume")
    device = _prepare(options)
    encoder = Encoder(load_tokenizer(Path(out) / "tokenizer.json"))
    documents = [read_documents(Path(path)) for path in options.data]
    token_sets = _tokenize(options, documents, encoder, progress)
    for token_set, digest in zip(token_sets, state.data, strict=True):
        if token_set.digest() != digest:
            raise ParameterError("data", token_set.name, "the texts of the run to resume")
    model = GPT(GPTConfig.from_dict(state.config), dropout=options.dropout)
    trainer = Trainer(
        model.to(device), encoder, token_sets, options,
        mix=state.mix, precision=state.precision, progress=progress,
    )  # fmt: skip
    trainer.restore(state)
    progress.line(f"resumes after step {state.step:,}")
    return _run(trainer, token_sets, progress)


def _run(trainer: Trainer, token_sets: Sequence[TokenSet], progress: Progress) -> int:
    code = trainer.run()
    if code:
        progress.line(f"saved after step {trainer.position.step:,}; go on with --resume")
        return code
    out = Path(trainer.options.out)
    best = read_checkpoint(out, tokenizer=NO_TOKENIZER)
    trainer.model.load_canonical(best.tensors)
    evaluation = trainer.evaluate(whole=True)
    write_json(out / SUMMARY, _summary(trainer, token_sets, evaluation))
    progress.line(f"best model, of step {trainer.position.best_step:,}: {evaluation}")
    characters = trainer.encoder.characters
    tokenizer = None if characters is None else from_chars(characters)
    path = convert(out, out / MODEL_FILE, tokenizer=tokenizer, force=True)
    progress.line(f"{out / WEIGHTS} is for transformers, {path} for gptx")
    return 0


def _prepare(options: TrainOptions) -> torch.device:
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return optim.choose_device(options.device)


def _tokenize(
    options: TrainOptions,
    documents: Sequence[Sequence[str]],
    encoder: Encoder,
    progress: Progress,
) -> list[TokenSet]:
    names = [Path(path).name for path in options.data]
    if len(set(names)) < len(names):
        names = list(options.data)
    token_sets = []
    for name, texts in zip(names, documents, strict=True):
        token_set = tokenize_file(
            name,
            texts,
            encoder.encode_batch,
            start_ids=encoder.start_ids,
            n_vocab=encoder.n_vocab,
        )
        progress.line(
            f"{name}: {len(texts):,} documents, {len(token_set.train):,} tokens to train on, "
            f"{len(token_set.val):,} held out"
        )
        token_sets.append(token_set)
    return token_sets


def _mixture(options: TrainOptions, token_sets: Sequence[TokenSet]) -> list[float]:
    weights = options.mix or [len(token_set.train) for token_set in token_sets]
    return [weight / sum(weights) for weight in weights]


def _summary(
    trainer: Trainer, token_sets: Sequence[TokenSet], evaluation: Evaluation
) -> dict[str, object]:
    """How the model was made and how good it is, without the places of files."""
    position, options = trainer.position, trainer.options.to_dict()
    del options["data"], options["out"]
    options["init"] = Path(trainer.options.init).name if trainer.options.init else None
    files: list[dict[str, object]] = []
    for token_set in token_sets:
        files.append({"name": token_set.name, "train_tokens": len(token_set.train)})
        for file in evaluation.files:
            if file.name == token_set.name:
                files[-1] |= asdict(file) | {"perplexity": math.exp(file.loss)}
    return {
        "steps": position.step,
        "best_step": position.best_step,
        "seconds": round(position.seconds),
        "files": files,
        "options": options,
    }
