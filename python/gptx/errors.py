"""Every error gptx raises on purpose.

A message reads ``what: expected ..., got ...``, then the remedy. Values that come from a file or a
caller are shown with ``repr`` and cut to 80 characters, so that no input can forge a message.
"""

from __future__ import annotations

from typing import Any

_MAX_SHOWN = 80


def shown(value: object) -> str:
    """``repr(value)``, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


class GptxError(Exception):
    """Base class of all errors raised by gptx. Copied and pickled as they are."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuilt, (type(self), self.args, self.__dict__)


def _rebuilt(kind: type[GptxError], args: tuple[Any, ...], state: dict[str, Any]) -> GptxError:
    """An error without its own ``__init__``, whose arguments are not the message."""
    error = BaseException.__new__(kind, *args)
    super(GptxError, error).__init__(*args)
    error.__dict__.update(state)
    return error


class ParameterError(GptxError, ValueError):
    """An argument is outside its documented range.

    Attributes: ``param`` (its name), ``value`` (as given), ``allowed`` (what is accepted).
    """

    def __init__(self, param: str, value: object, allowed: str) -> None:
        super().__init__(f"{param}: expected {allowed}, got {shown(value)}")
        self.param = param
        self.value = value
        self.allowed = allowed


class TokenIdError(ParameterError):
    """A token id is not an integer in ``[0, vocab_size)``. ``index`` is its place."""

    def __init__(self, param: str, index: int, token_id: object, vocab_size: int) -> None:
        super().__init__(f"{param}[{index}]", token_id, f"an integer from 0 to {vocab_size - 1}")
        self.index = index
        self.token_id = token_id
        self.vocab_size = vocab_size


class TokenizeError(GptxError, ValueError):
    """A text cannot be encoded, or the tokenizer is missing. Says what and where."""


class ContextLengthError(GptxError, ValueError):
    """A prompt does not fit the context. ``have`` tokens were given, ``limit`` are possible.

    ``param`` names it: "prompt", or "prompt[3]" of a list.
    """

    def __init__(
        self, have: int, limit: int, remedy: str = "shorten the prompt", *, param: str = "prompt"
    ) -> None:
        super().__init__(f"{param}: expected at most {limit} tokens, got {have}; {remedy}")
        self.param = param
        self.have = have
        self.limit = limit


class ModelFileError(GptxError):
    """A ``.gptx`` or safetensors file is damaged, truncated or not what it claims to be.

    Attributes: ``path``, ``field`` (the header field or tensor), ``offset`` (byte in the file),
    ``expected``, ``found``.
    """

    def __init__(
        self,
        path: object,
        field: str,
        offset: int,
        expected: object,
        found: object,
        remedy: str = "",
    ) -> None:
        text = f"{path}: {field} at byte {offset}: expected {expected}, got {shown(found)}"
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.path = str(path)
        self.field = field
        self.offset = offset
        self.expected = expected
        self.found = found


class UnsafeCheckpointError(GptxError):
    """A pickle asks for something outside the allow-list. Nothing of it was executed.

    Attributes: ``path``, ``opcode``, ``name`` (the refused global, if any), ``offset``.
    """

    def __init__(
        self, path: object, opcode: str, name: str | None, offset: int, remedy: str = ""
    ) -> None:
        what = f"opcode {opcode}" + (f" ({shown(name)})" if name is not None else "")
        text = f"{path}: refused pickle {what} at byte {offset}"
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.path = str(path)
        self.opcode = opcode
        self.name = name
        self.offset = offset


class ConvertError(GptxError):
    """A checkpoint does not make a GPT-2, or its conversion cannot be written.

    ``tensor`` names the tensor at fault where there is one.
    """

    def __init__(self, message: str, *, tensor: str | None = None) -> None:
        super().__init__(message)
        self.tensor = tensor


class TrainingError(GptxError, ArithmeticError):
    """Training cannot go on: a loss is infinite or NaN. Says which, and at which step."""


class OutOfMemoryError(GptxError, MemoryError):
    """The request needs more memory than it may have. ``need`` and ``have`` are bytes."""

    def __init__(self, what: str, need: int, have: int, remedy: str = "") -> None:
        text = f"{what}: needs {need:,} bytes, {have:,} are available"
        super().__init__(f"{text}; {remedy}" if remedy else text)
        self.need = need
        self.have = have


class NonFiniteLogitsError(GptxError, ArithmeticError):
    """The logits of one request contain NaN or infinity; other requests go on."""


class UnsupportedError(GptxError):
    """A feature, ISA or backend that this build or machine does not have."""


class DeviceError(GptxError):
    """The device cannot run the model: not built, no driver, no memory."""


class MissingExtraError(GptxError, ImportError):
    """A feature needs a package of an optional extra; the message holds the pip command."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed; "
            f'run: pip install "gptx[{extra}]"'
        )
        self.package = package
        self.extra = extra
