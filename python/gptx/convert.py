"""``gptx-convert``: a foreign checkpoint becomes one ``.gptx`` file.

Tensors are read, packed and written one at a time; the file appears whole or not at all.
"""

from __future__ import annotations

import argparse
import math
import mmap
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import numpy as np

from gptx import modelfile
from gptx.checkpoints import GPT2_VOCAB, NO_TOKENIZER, Checkpoint, read_checkpoint
from gptx.errors import ConvertError, GptxError, ParameterError, TokenizeError, UnsupportedError
from gptx.modelfile import layout

if TYPE_CHECKING:
    from gptx.config import GPTConfig
    from gptx.tokenizer import TokenizerSpec

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What `run` did: the file, what it was made of, and the parity report or why there is none."""

    path: Path
    checkpoint: Checkpoint
    dtype: str
    seconds: float
    parity: dict[str, object] | None
    parity_skipped: str


def convert(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "float32",
    force: bool = False,
    tokenizer: str | os.PathLike[str] | TokenizerSpec | None = None,
    activation: str | None = None,
    n_head: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Path:
    """Converts a checkpoint to a ``.gptx`` file.

    Args:
        source: what `gptx.checkpoints.read_checkpoint` reads.
        output: the file to write; default the name of the source with ``.gptx``, beside it.
        dtype: of the matrices: "float32", "bfloat16" or "int8".
        force: replace an existing file.
        tokenizer: a file, a folder or a spec; default what lies beside the checkpoint, else
            tiktoken's "gpt2" for a vocabulary of its size. "none" leaves it out.
        activation: "gelu_new", "gelu" or "relu", where the checkpoint's own is wrong or not said.
        n_head: number of heads, for a bare state_dict.
        verify: compare the file with torch, where it is installed, and keep the report in the file.
        progress: called with a tensor's name, the bytes written and the bytes in all.

    Returns:
        The path of the file.

    Raises:
        ParameterError: an argument is not valid, or the output exists. Nothing was done.
        FileNotFoundError: there is no source.
        ConvertError, ModelFileError, UnsafeCheckpointError, TokenizeError: the source cannot be
            converted, or the output not be written; an existing output is what it was.
    """
    return run(
        source,
        output,
        dtype=dtype,
        force=force,
        tokenizer=tokenizer,
        activation=activation,
        n_head=n_head,
        verify=verify,
        progress=progress,
    ).path


def run(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    *,
    dtype: str = "float32",
    force: bool = False,
    tokenizer: str | os.PathLike[str] | TokenizerSpec | None = None,
    activation: str | None = None,
    n_head: int | None = None,
    verify: bool = True,
    progress: Progress | None = None,
) -> Conversion:
    """`convert`, with all that it found out."""
    started = time.monotonic()
    if dtype not in modelfile.DTYPES:
        raise ParameterError("dtype", dtype, "one of " + ", ".join(modelfile.DTYPES))
    _check_source(Path(source))
    path = _output(Path(source), output, force)
    checkpoint = _read(Path(source), tokenizer, activation, n_head)
    modelfile.write(
        path,
        checkpoint.config,
        checkpoint.tensors,
        dtype=dtype,
        tokenizer=checkpoint.tokenizer,
        generation=checkpoint.generation,
        source=checkpoint.source,
        license=checkpoint.license,
        force=force,
        progress=progress,
    )
    report, skipped = None, "not asked for"
    if verify:
        report, skipped = _parity(path, checkpoint)
    seconds = time.monotonic() - started
    return Conversion(path, checkpoint, dtype, seconds, report, skipped)


def convert_in_memory(
    source: str | os.PathLike[str], *, dtype: str = "float32"
) -> modelfile.ModelFile:
    """A checkpoint as an open model file that is on no disk, for `gptx.load`.

    Raises:
        As `convert`; a GPT-2 tokenizer that cannot be had is left out instead.
    """
    path = Path(source)
    try:
        checkpoint = _read(path, None, None, None)
    except TokenizeError:
        checkpoint = _read(path, NO_TOKENIZER, None, None)
    config = checkpoint.config
    stored = {tensor.name: tensor for tensor in layout.stored_tensors(config, dtype)}
    # Pages of an anonymous mapping are aligned, as those of a file are.
    memory = mmap.mmap(-1, max(tensor.end for tensor in stored.values()))
    tensors = {}
    for name in modelfile.canonical_shapes(config):
        try:
            arrays = layout.store(config, dtype, name, checkpoint.tensors[name])
        except OverflowError as error:
            raise ConvertError(f"tensor {name}: {error}; use float32", tensor=name) from None
        for key, array in arrays.items():
            view = np.frombuffer(memory, array.dtype, array.size, stored[key].begin)
            view = view.reshape(array.shape)
            view[...] = array
            view.flags.writeable = False
            tensors[key] = view
    text = "" if checkpoint.tokenizer is None else checkpoint.tokenizer.to_json()
    return modelfile.ModelFile(
        path=path,
        config=config,
        dtype=dtype,
        generation=checkpoint.generation,
        parity=None,
        source=checkpoint.source,
        license=checkpoint.license,
        metadata={"tokenizer": text},
        checksums={},
        tensors=tensors,
        data_start=0,
        size=len(memory),
    )


def _output(source: Path, output: str | os.PathLike[str] | None, force: bool) -> Path:
    """Where to write; refuses what is not possible before any work."""
    if output is not None:
        path = Path(output)
    elif source.is_dir():
        named = source.resolve() if source.name in ("", "..") else source
        path = named.with_name(named.name + ".gptx")
    else:
        path = source.with_name(Path(source.name.removesuffix(".index.json")).stem + ".gptx")
    if source.suffix == ".gptx" and path == source and source.exists():
        raise ConvertError(f"{source}: already a .gptx file; load it with gptx.load")
    if path.is_dir():
        raise ParameterError("output", str(path), "the name of a file, not of a folder")
    if path.exists() and not force:
        allowed = "a name not in use, or force (--force) to replace the file"
        raise ParameterError("output", str(path), allowed)
    if path.exists() and source.exists() and path.samefile(source):
        raise ParameterError("output", str(path), "another name than the source")
    if not path.parent.is_dir():
        raise ConvertError(f"{path}: cannot be written: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise ConvertError(f"{path}: cannot be written: no permission in {path.parent}")
    return path


def _read(
    source: Path,
    tokenizer: str | os.PathLike[str] | TokenizerSpec | None,
    activation: str | None,
    n_head: int | None,
) -> Checkpoint:
    """The checkpoint with its tokenizer: its own, or tiktoken's where the vocabulary is GPT-2's."""
    _check_source(source)
    checkpoint = read_checkpoint(source, tokenizer=tokenizer, activation=activation, n_head=n_head)
    if tokenizer == NO_TOKENIZER or checkpoint.tokenizer is not None:
        return checkpoint
    if checkpoint.config.vocab_size != GPT2_VOCAB:
        checkpoint.notes.append("no tokenizer found: prompts must be token ids (see --tokenizer)")
        return checkpoint
    from gptx.checkpoints.tokenizer_files import gpt2_spec

    try:
        checkpoint.tokenizer = gpt2_spec()
    except TokenizeError as error:
        remedy = "or go without it: --tokenizer none"
        raise TokenizeError(f"no tokenizer beside {source}: {error}; {remedy}") from None
    checkpoint.notes.append("no tokenizer found: tiktoken's gpt2, which has the same size")
    return checkpoint


def _check_source(source: Path) -> None:
    if source.exists():
        return
    message = f"{source}: no such file or folder"
    if len(source.parts) == 2 and source.parts[0] not in ("..", source.root):
        folder = source.name
        message += (
            f"; for a model of the Hugging Face Hub: hf download {source} --local-dir {folder}"
        )
    raise FileNotFoundError(message)


def _parity(path: Path, checkpoint: Checkpoint) -> tuple[dict[str, object] | None, str]:
    from gptx import parity

    try:
        report = parity.measure(path, checkpoint.config, checkpoint.tensors)
    except UnsupportedError as error:
        return None, str(error)
    modelfile.update(path, parity=report)
    return report, ""


# -- the command


def main(argv: Sequence[str] | None = None) -> int:
    """Runs ``gptx-convert`` and returns its exit code: 0 done, 1 refused, 130 interrupted."""
    options = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    bar = ProgressBar(sys.stderr)
    try:
        result = run(
            options.source,
            options.output,
            dtype=options.dtype,
            force=options.force,
            tokenizer=options.tokenizer,
            activation=options.activation,
            n_head=options.n_head,
            verify=not options.no_parity,
            progress=bar,
        )
    except KeyboardInterrupt:
        bar.clear()
        print("gptx-convert: interrupted", file=sys.stderr)
        return 130
    except (GptxError, OSError, MemoryError) as error:
        bar.clear()
        if options.debug:
            traceback.print_exc()
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"gptx-convert: error: {text}", file=sys.stderr)
        return 1
    bar.clear()
    print("\n".join(summary(options.source, result)))
    return 0


def summary(source: str, result: Conversion) -> list[str]:
    """The lines that the command prints at its end."""
    from gptx import parity

    checkpoint, config = result.checkpoint, result.checkpoint.config
    spec = checkpoint.tokenizer
    tied = "tied" if config.tie_word_embeddings else "untied"
    lines = [
        f"{source}: {checkpoint.source}",
        f"  {config.n_params / 1e6:.1f} M parameters: {config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} wide, context {config.block_size}, "
        f"{config.activation}, head {tied}",
        *([f"  classification head: {_labels(config)}"] if config.labels else []),
        "  no tokenizer" if spec is None else f"  tokenizer: {spec.kind}, {spec.n_vocab} tokens",
        *(f"  note: {note}" for note in checkpoint.notes),
    ]
    if result.parity is not None:
        lines.append(f"  {parity.describe(result.parity)}")
    else:
        lines.append(f"  parity with torch: skipped, {result.parity_skipped}")
    size = result.path.stat().st_size
    lines.append(f"wrote {result.path}: {size / 1e6:.1f} MB {result.dtype}, {result.seconds:.1f} s")
    if spec is not None:
        lines.append(f'next: gptx -m {result.path} "Once upon a time"')
    return lines


def _labels(config: GPTConfig) -> str:
    """The names of a head in one printable line, cut to 100 characters."""
    text = ", ".join(map(repr, config.labels))
    text = text if len(text) <= 100 else f"{text[:97]}..."
    return f"{text} ({config.problem_type})"


class ProgressBar:
    """One line that is drawn over again, and only on a terminal. Called as a `Progress`."""

    _WIDTH = 30

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._shown = stream.isatty()
        self._last = -math.inf

    def __call__(self, name: str, done: int, total: int) -> None:
        """Draws at most ten times a second, and at the end."""
        now = time.monotonic()
        if not self._shown or (now - self._last < 0.1 and done < total):
            return
        self._last = now
        filled = self._WIDTH * done // max(total, 1)
        bar = "#" * filled + "-" * (self._WIDTH - filled)
        sizes = f"{done / 1e6:,.0f} of {total / 1e6:,.0f} MB"
        self._stream.write(f"\r\x1b[K[{bar}] {sizes}  {name}")
        self._stream.flush()

    def clear(self) -> None:
        """Removes the line, if one was drawn."""
        if self._last > 0:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptx-convert",
        description="Makes a .gptx file of a GPT-2 checkpoint: a Hugging Face folder, a nanoGPT "
        "ckpt.pt, or a state_dict. Torch is not needed, and nothing in the file is executed.",
    )
    parser.add_argument("source", help="a folder or a file; its format is found by its content")
    parser.add_argument("-o", "--output", help="file to write (default: SOURCE.gptx, beside it)")
    parser.add_argument(
        "--dtype", choices=modelfile.DTYPES, default="float32", help="of the matrices"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="a tokenizer's file or folder, or 'none' (default: beside SOURCE, else GPT-2's)",
    )
    parser.add_argument(
        "--activation", choices=("gelu_new", "gelu", "relu"), help="override the checkpoint's"
    )
    parser.add_argument("--n-head", type=int, help="heads of a state_dict that does not say")
    parser.add_argument(
        "--no-parity", action="store_true", help="do not compare the result with torch"
    )
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    return parser


if __name__ == "__main__":
    sys.exit(main())
