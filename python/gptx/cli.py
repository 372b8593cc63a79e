"""The command ``gptx``. Generated text goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 the input or a file is wrong, or a guided text was cut off, 2 the command line
is wrong, 130 Ctrl-C (the text so far stands), 141 the reader of the output has gone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptx.guided import Guide
    from gptx.model import Stream

# Commands whose options and work are in a module of their own: its name, and one line.
_MODULES = {
    "classify": ("gptx.commands.classify", "which of several labels a text has"),
    "translate": ("gptx.commands.translate", "ask for a text in another language"),
    "answer": ("gptx.commands.answer", "ask for the answer to a question"),
    "summarize": ("gptx.commands.summarize", "ask for the gist of a text"),
    "eval": ("gptx.commands.evaluation", "perplexity of a text, or tasks of lm-eval"),
    "train": ("gptx.training.cli", "train or fine-tune a GPT-2 (needs torch)"),
}

COMMANDS = ("generate", "convert", "info", "verify", *_MODULES)

_DESCRIPTION = """\
gptx "Once upon a time" continues a prompt with the built-in model; see gptx COMMAND --help.
A prompt that is the name of a command is written: gptx generate info"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    arguments = [_as_utf8(a) for a in (sys.argv[1:] if argv is None else argv)]
    if arguments and arguments[0] == "convert":
        from gptx import convert

        return convert.main(arguments[1:])
    if not (arguments and arguments[0] in (*COMMANDS, "-h", "--help", "--version")):
        arguments.insert(0, "generate")
    options = _parser(arguments[0]).parse_args(arguments)
    _use_utf8()
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit; let it write into nothing.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if options.debug:
            traceback.print_exc()
            return 1
        return _report(error)


def _report(error: Exception) -> int:
    """One line for errors the user can mend; anything else is a bug and shows where it is."""
    from gptx.errors import GptxError

    if isinstance(error, GptxError | OSError):
        print(f"gptx: error: {error}", file=sys.stderr)
    else:
        traceback.print_exception(error)
    return 1


def _parser(chosen: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptx", description=_DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    commands.add_parser("convert", help="make a .gptx file of a PyTorch checkpoint", add_help=False)

    info = _command(commands, "info", _info, "what a .gptx file holds, or what gptx runs on")
    info.add_argument("file", nargs="?", metavar="FILE")
    info.add_argument("--devices", action="store_true", help="the GPUs, or why there are none")
    info.add_argument("--json", action="store_true", help="one JSON object")

    verify = _command(commands, "verify", _verify, "check every byte of a .gptx file")
    verify.add_argument("file", metavar="FILE")

    for name, (module, text) in _MODULES.items():
        command = _command(commands, name, _run_module, text)
        if name == chosen:
            import_module(module).add_arguments(command)
    return parser


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    run: Callable[[argparse.Namespace], int],
    text: str,
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--debug", action="store_true", help="show where an error comes from")
    parser.set_defaults(run=run)
    return parser


def _add_generate(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from gptx.sampling import SamplingParams

    parser = _command(commands, "generate", _generate, "continue a prompt")
    defaults = {field.name: field.default for field in dataclasses.fields(SamplingParams)}
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="default, or '-': stdin")
    parser.add_argument("-m", "--model", help="a .gptx file or checkpoint")
    options: list[tuple[tuple[str, ...], type, str]] = [
        (("-n", "--max-new-tokens"), int, "tokens to generate at most"),
        (("--min-new-tokens",), int, "tokens before the text may end"),
        (("-t", "--temperature"), float, "0 takes the most likely token"),
        (("--top-k",), int, "keep the k most likely tokens; 0 keeps all"),
        (("--top-p",), float, "keep the most likely tokens that reach this probability"),
        (("--min-p",), float, "keep tokens with this share of the largest probability"),
        (("--repetition-penalty",), float, "above 1 avoids tokens already used"),
        (("--num-beams",), int, "above 1 searches for the likeliest text"),
        (
            ("--prompt-lookup",),
            int,
            "faster where the text repeats itself: tokens of a draft, to 16",
        ),
    ]
    for flags, kind, text in options:
        default = defaults[flags[-1].removeprefix("--").replace("-", "_")]
        parser.add_argument(*flags, type=kind, default=default, help=f"{text} (default {default})")
    parser.add_argument("--seed", type=int, help="the same seed gives the same text")
    parser.add_argument(
        "--stop", action="append", default=[], help="end before this text; repeatable"
    )
    parser.add_argument(
        "--context",
        choices=("stop", "slide"),
        default="stop",
        help="where the context is full, end (default) or go on from the last half",
    )
    parser.add_argument("--ignore-eos", action="store_true", help="go on past the end token")
    guides = parser.add_mutually_exclusive_group()
    guides.add_argument(
        "--json-schema", metavar="FILE|JSON", help="write JSON of this schema; true is any JSON"
    )
    guides.add_argument("--regex", metavar="PATTERN", help="write what this pattern matches")
    guides.add_argument("--grammar", metavar="FILE", help="write what this Lark grammar allows")
    guides.add_argument(
        "--choice", action="append", metavar="TEXT", help="write one of these texts; repeatable"
    )
    parser.add_argument("--threads", type=int, help="default: as many as the machine has cores")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, cuda:1, or auto")
    parser.add_argument(
        "--precision", help="how to compute; default what the weights are stored as"
    )
    parser.add_argument("--json", action="store_true", help="the whole result as one JSON object")


def _generate(options: argparse.Namespace) -> int:
    import gptx
    from gptx.commands import text_or_stdin

    prompt = text_or_stdin(options.prompt, "PROMPT", whole=True)
    names = [field.name for field in dataclasses.fields(gptx.SamplingParams)]
    chosen = {name: getattr(options, name) for name in names if hasattr(options, name)}
    params = gptx.SamplingParams(guide=_guide(options), **chosen)
    model = gptx.load(
        options.model or os.environ.get("GPTX_MODEL"),
        device=options.device,
        threads=options.threads,
        precision=options.precision,
    )

    if options.json:
        result = model.generate(prompt, params)
        fields = {k: v for k, v in dataclasses.asdict(result).items() if k != "error"}
        print(json.dumps(fields, ensure_ascii=False))
    else:
        stream = model.stream(prompt, params)
        code = _stream(stream, prompt)
        if code:
            return code
        result = stream.result
    if params.guide is not None and result.finish_reason != "stop":
        after = f"{result.completion_tokens} tokens ({result.finish_reason})"
        print(f"gptx: the text was cut off after {after} and may be incomplete", file=sys.stderr)
        return 1
    return 0


def _guide(options: argparse.Namespace) -> Guide | None:
    from gptx import guided

    if options.json_schema is not None:
        text = options.json_schema
        return guided.json_schema(text if _is_json(text) else _text_of(text))
    if options.regex is not None:
        return guided.regex(options.regex)
    if options.grammar is not None:
        return guided.grammar(_text_of(options.grammar))
    return None if options.choice is None else guided.choices(options.choice)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return text.lstrip().startswith("{")  # broken JSON rather than a file of that name
    return True


def _text_of(path: str) -> str:
    from gptx.errors import ParameterError

    try:
        return Path(path).read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ParameterError("FILE", path, "a text in UTF-8") from None


def _stream(stream: Stream, prompt: str) -> int:
    bold = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"\033[1m{prompt}\033[0m" if bold else prompt, end="", flush=True)
    start = time.perf_counter()
    first = 0.0
    code = 0
    try:
        for piece in stream:
            first = first or time.perf_counter() - start
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stream.close()
        code = 130
    seconds = time.perf_counter() - start
    print(flush=True)
    if sys.stderr.isatty():
        result = stream.result
        rate = result.completion_tokens / seconds if seconds > 0 else 0.0
        print(
            f"[gptx] {result.completion_tokens} tokens · {rate:.0f} tokens/s · "
            f"first after {first * 1e3:.0f} ms · seed {result.seed}",
            file=sys.stderr,
        )
    return code


def _info(options: argparse.Namespace) -> int:
    if options.devices:
        rows = _devices()
    else:
        rows = _about() if options.file is None else _describe_file(options.file)
    if options.json:
        print(json.dumps(dict(rows), ensure_ascii=False))
        return 0
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
    return 0


def _describe_file(path: str) -> list[tuple[str, str]]:
    from gptx import modelfile

    return modelfile.describe(modelfile.read(path))


def _about() -> list[tuple[str, str]]:
    from importlib.util import find_spec

    from gptx import _core

    extras = {
        "guided": ("llguidance",),
        "eval": ("lm_eval",),
        "train": ("torch", "tokenizers"),
        "bench": ("torch", "transformers"),
    }
    missing = [name for name, needs in extras.items() if not all(map(find_spec, needs))]
    return [
        ("gptx", _version()),
        ("kernels", f"{_core.usable_isas()[0]} (usable: {', '.join(_core.usable_isas())})"),
        ("threads", str(_core.usable_cpus())),
        ("cuda", _core.cuda_build),
        ("extras missing", ", ".join(missing) or "none"),
    ]


def _devices() -> list[tuple[str, str]]:
    from gptx import cuda

    found = cuda.status()
    rows = [("cuda", found.build), ("usable", "yes" if found.usable else f"no: {found.reason}")]
    for name, version in (("driver", found.driver_version), ("runtime", found.runtime_version)):
        text = f"CUDA {version // 1000}.{version % 1000 // 10}" if version else "none"
        rows.append((name, text))
    for i, d in enumerate(found.devices):
        gib = f"{d.free_bytes / 2**30:.1f} of {d.total_bytes / 2**30:.1f} GiB free"
        code = "" if d.usable else ", no code for it in this build"
        capability = f"{d.capability // 10}.{d.capability % 10}"
        rows.append((f"cuda:{i}", f"{d.name}, compute capability {capability}, {gib}{code}"))
    return rows


def _verify(options: argparse.Namespace) -> int:
    from gptx import modelfile

    modelfile.verify(options.file)
    print(f"{options.file}: every byte is as it was written")
    return 0


def _run_module(options: argparse.Namespace) -> int:
    code: int = import_module(_MODULES[options.command][0]).run(options)
    return code


def _version() -> str:
    import gptx

    return gptx.__version__


def _as_utf8(argument: str) -> str:
    """The argument as UTF-8, whatever the locale took its bytes for."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        return argument


def _use_utf8() -> None:
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(encoding="utf-8", errors="strict" if stream is sys.stdin else "replace")
