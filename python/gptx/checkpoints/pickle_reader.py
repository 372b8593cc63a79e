"""An interpreter of the few pickle opcodes that plain data and torch files need.

A pickle is a program for a stack machine; the standard library's machine can import and call
anything. This one knows 37 opcodes, builds only plain Python values, and looks names up in a
closed table given by the caller. Everything else raises `UnsafeCheckpointError`. Nothing is ever
imported or called by name, nothing recurses over the input, and there is no other way to read a
pickle.

Opcodes: Python's Lib/pickletools.py describes them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptx.errors import ModelFileError, UnsafeCheckpointError, shown

MAX_PICKLE = 16 << 20
_MAX_OPCODES = 1_000_000
_MAX_MEMO = 500_000
_MAX_STACK = 100_000
_MAX_INT_KEY = 2**31

REMEDY = (
    "gptx reads tensors and plain values only; if the file is yours, save its weights alone: "
    'torch.save(model.state_dict(), "weights.pt")'
)


@dataclass(frozen=True)
class Constructor:
    """A global that may be called: ``build`` gets the tuple of arguments and returns a value.

    ``build`` raises ValueError, with the reason, for arguments it does not accept.
    """

    name: str
    build: Callable[[tuple[object, ...]], object]


class Buildable:
    """A value that accepts a BUILD opcode. `set_state` raises ValueError for a state it refuses."""

    def set_state(self, state: object) -> None:
        """Takes the state of a BUILD opcode."""
        raise NotImplementedError


class OrderedDict(dict[object, object], Buildable):
    """Stands for ``collections.OrderedDict``; keeps the order, drops torch's version numbers."""

    def set_state(self, state: object) -> None:
        """Accepts ``{"_metadata": ...}``, the one attribute that ``state_dict()`` sets."""
        if type(state) is not dict or not state.keys() <= {"_metadata"}:
            raise ValueError("an OrderedDict takes no state but _metadata")


def read_pickle(
    data: bytes,
    path: object,
    table: Mapping[str, object] | None = None,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """The value that a pickle of protocol 2 to 5 describes.

    Args:
        data: the whole pickle, at most 16 MiB.
        path: of the file, for errors.
        table: ``"module name"`` -> the value of that global; a `Constructor` may be called.
        persistent: turns the payload of BINPERSID into a value, or raises ValueError.

    Returns:
        None, bool, int, float, str, bytes, list, tuple, dict (keys are str or int), or values of
        the table and of the constructors. Lists and dicts may contain themselves: do not walk
        them recursively.

    Raises:
        UnsafeCheckpointError: an opcode, a global or an argument outside of the allow-list.
        ModelFileError: the pickle is truncated, malformed or too large.
    """
    return _Machine(data, path, table or {}, persistent).run()


class _Machine:
    def __init__(
        self,
        data: bytes,
        path: object,
        table: Mapping[str, object],
        persistent: Callable[[object], object] | None,
    ) -> None:
        self.data = data
        self.path = path
        self.table = table
        self.persistent = persistent
        self.at = 0  # of the current opcode
        self.pos = 0
        self.stack: list[object] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        if len(self.data) > MAX_PICKLE:
            raise self.damaged(f"at most {MAX_PICKLE} bytes", len(self.data))
        for _ in range(_MAX_OPCODES):
            self.at = self.pos
            code = self.take(1)[0]
            if code == _STOP:
                return self.finish()
            handler = _HANDLERS.get(code)
            if handler is None:
                raise self.refused(_NAMES.get(code, f"0x{code:02x}"), self.named_by(code))
            handler(self)
            if len(self.stack) > _MAX_STACK or len(self.marks) > _MAX_STACK:
                raise self.damaged(f"at most {_MAX_STACK} values on the stack", "more")
        raise self.damaged(f"at most {_MAX_OPCODES} opcodes", "more")

    def finish(self) -> object:
        if len(self.stack) != 1 or self.marks:
            raise self.damaged("one value on the stack at STOP", len(self.stack))
        if self.data[0] != 0x80:
            raise self.damaged("protocol 2 to 5", "an older one")
        if self.pos != len(self.data):
            raise self.damaged("the end after STOP", f"{len(self.data) - self.pos} more bytes")
        return self.stack[0]

    # -- errors

    def damaged(self, expected: object, found: object) -> ModelFileError:
        return ModelFileError(self.path, "pickle", self.at, expected, found)

    def refused(self, opcode: str, name: str | None, reason: str = "") -> UnsafeCheckpointError:
        remedy = f"{reason}; {REMEDY}" if reason else REMEDY
        return UnsafeCheckpointError(self.path, opcode, name, self.at, remedy)

    def named_by(self, code: int) -> str | None:
        """What a refused opcode would have imported or called, as far as the bytes say."""
        try:
            return self._operand(code)
        except ModelFileError:
            return None

    def _operand(self, code: int) -> str | None:
        if code == ord("i"):  # INST: module, name
            return f"{self.line()} {self.line()}"
        if code == ord("P"):  # PERSID
            return self.line()
        if code in _EXTENSIONS:
            return f"extension {int.from_bytes(self.take(_EXTENSIONS[code]), 'little')}"
        if code in (0x81, 0x92):  # NEWOBJ, NEWOBJ_EX: the class lies below the arguments
            below = 2 if code == 0x81 else 3
            return describe(self.stack[-below]) if len(self.stack) >= below else None
        return None

    # -- input

    def take(self, count: int) -> bytes:
        end = self.pos + count
        if end > len(self.data):
            raise self.damaged(f"{count} more bytes", f"{len(self.data) - self.pos}")
        part = self.data[self.pos : end]
        self.pos = end
        return part

    def number(self, count: int) -> int:
        return int.from_bytes(self.take(count), "little")

    def line(self) -> str:
        end = self.data.find(b"\n", self.pos, self.pos + 1024)
        if end < 0:
            raise self.damaged("a line of at most 1023 bytes", "none")
        raw = self.data[self.pos : end]
        self.pos = end + 1
        return self.text(raw)

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged("text in UTF-8", raw[:80]) from None

    # -- stack

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop(self) -> object:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise self.damaged("a value on the stack", "none")
        return self.stack.pop()

    def top(self) -> object:
        self.push(value := self.pop())
        return value

    def pop_mark(self) -> list[object]:
        if not self.marks:
            raise self.damaged("a mark on the stack", "none")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def put(self, index: int) -> None:
        if len(self.memo) >= _MAX_MEMO or index >= _MAX_MEMO:
            raise self.damaged(f"at most {_MAX_MEMO} memo entries", index)
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise self.damaged("a memo index that was put", index)
        self.push(self.memo[index])

    # -- containers

    def tuple_of(self, count: int) -> None:
        if len(self.stack) - count < (self.marks[-1] if self.marks else 0):
            raise self.damaged(f"{count} values on the stack", len(self.stack))
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def append(self, items: list[object]) -> None:
        target = self.top()
        if type(target) is not list:
            raise self.refused(_NAMES[self.data[self.at]], describe(target), "not a list")
        target.extend(items)

    def set_items(self, items: list[object]) -> None:
        target = self.top()
        if not (type(target) is dict or type(target) is OrderedDict):
            raise self.refused(_NAMES[self.data[self.at]], describe(target), "not a dict")
        if len(items) % 2:
            raise self.damaged("keys with values", len(items))
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Other keys would be hashed by code that recurses or collides.
            if not (type(key) is str or (type(key) is int and abs(key) < _MAX_INT_KEY)):
                raise self.damaged("a dict key that is a str or a small int", describe(key))
            if key in target:
                raise self.damaged("a key used once", key)
            target[key] = value

    # -- names and calls

    def find_global(self, opcode: str, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise self.refused(opcode, describe(module), "the name of a global is not text")
        key = f"{module} {name}"
        if key not in self.table or " " in module or " " in name:
            raise self.refused(opcode, key)
        self.push(self.table[key])

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if type(function) is not Constructor or type(args) is not tuple:
            raise self.refused("REDUCE", describe(function), "not a constructor with arguments")
        try:
            self.push(function.build(args))
        except ValueError as error:
            raise self.refused("REDUCE", function.name, str(error)) from None

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if not isinstance(target, Buildable):
            raise self.refused("BUILD", describe(target), "the value takes no state")
        try:
            target.set_state(state)
        except ValueError as error:
            raise self.refused("BUILD", describe(target), str(error)) from None

    def persistent_id(self) -> None:
        payload = self.pop()
        if self.persistent is None:
            raise self.refused("BINPERSID", describe(payload), "there are no tensors here")
        try:
            self.push(self.persistent(payload))
        except ValueError as error:
            raise self.refused("BINPERSID", describe(payload), str(error)) from None

    # -- header

    def protocol(self) -> None:
        version = self.take(1)[0]
        if self.at != 0 or not 2 <= version <= 5:
            raise self.damaged("protocol 2 to 5, once, at the start", version)

    def frame(self) -> None:
        size = self.number(8)
        if size > len(self.data) - self.pos:
            raise self.damaged(f"a frame of at most {len(self.data) - self.pos} bytes", size)


def describe(value: object) -> str:
    """A short text for errors; never walks into a container."""
    if type(value) is Constructor:
        return value.name
    if type(value) in (str, bytes, bool, int, float):
        return shown(value[:80] if isinstance(value, str | bytes) else value)
    if type(value) in (tuple, list, dict, OrderedDict):
        return f"{type(value).__name__} of {len(value)}"  # type: ignore[arg-type]
    return type(value).__name__


_STOP = ord(".")
_EXTENSIONS = {0x82: 1, 0x83: 2, 0x84: 4}

_HANDLERS: dict[int, Callable[[_Machine], None]] = {
    0x80: _Machine.protocol,
    0x95: _Machine.frame,
    # plain values
    ord("N"): lambda m: m.push(None),
    0x88: lambda m: m.push(True),
    0x89: lambda m: m.push(False),
    ord("J"): lambda m: m.push(int.from_bytes(m.take(4), "little", signed=True)),
    ord("K"): lambda m: m.push(m.number(1)),
    ord("M"): lambda m: m.push(m.number(2)),
    0x8A: lambda m: m.push(int.from_bytes(m.take(m.number(1)), "little", signed=True)),
    ord("G"): lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
    ord("X"): lambda m: m.push(m.text(m.take(m.number(4)))),
    0x8C: lambda m: m.push(m.text(m.take(m.number(1)))),
    ord("B"): lambda m: m.push(m.take(m.number(4))),
    ord("C"): lambda m: m.push(m.take(m.number(1))),
    # containers
    ord("("): lambda m: m.marks.append(len(m.stack)),
    ord(")"): lambda m: m.push(()),
    0x85: lambda m: m.tuple_of(1),
    0x86: lambda m: m.tuple_of(2),
    0x87: lambda m: m.tuple_of(3),
    ord("t"): lambda m: m.push(tuple(m.pop_mark())),
    ord("]"): lambda m: m.push([]),
    ord("a"): lambda m: m.append([m.pop()]),
    ord("e"): lambda m: m.append(m.pop_mark()),
    ord("}"): lambda m: m.push({}),
    ord("s"): lambda m: m.set_items([m.pop(), m.pop()][::-1]),
    ord("u"): lambda m: m.set_items(m.pop_mark()),
    # memo
    ord("q"): lambda m: m.put(m.number(1)),
    ord("r"): lambda m: m.put(m.number(4)),
    0x94: lambda m: m.put(len(m.memo)),
    ord("h"): lambda m: m.get(m.number(1)),
    ord("j"): lambda m: m.get(m.number(4)),
    # names and calls
    ord("c"): lambda m: m.find_global("GLOBAL", m.line(), m.line()),
    0x93: lambda m: m.find_global("STACK_GLOBAL", *[m.pop(), m.pop()][::-1]),
    ord("R"): _Machine.reduce,
    ord("b"): _Machine.build,
    ord("Q"): _Machine.persistent_id,
}

_NAMES = {
    0x28: "MARK", 0x29: "EMPTY_TUPLE", 0x2E: "STOP", 0x30: "POP", 0x31: "POP_MARK", 0x32: "DUP",
    0x42: "BINBYTES", 0x43: "SHORT_BINBYTES", 0x46: "FLOAT", 0x47: "BINFLOAT", 0x49: "INT",
    0x4A: "BININT", 0x4B: "BININT1", 0x4C: "LONG", 0x4D: "BININT2", 0x4E: "NONE", 0x50: "PERSID",
    0x51: "BINPERSID", 0x52: "REDUCE", 0x53: "STRING", 0x54: "BINSTRING", 0x55: "SHORT_BINSTRING",
    0x56: "UNICODE", 0x58: "BINUNICODE", 0x5D: "EMPTY_LIST", 0x61: "APPEND", 0x62: "BUILD",
    0x63: "GLOBAL", 0x64: "DICT", 0x65: "APPENDS", 0x67: "GET", 0x68: "BINGET", 0x69: "INST",
    0x6A: "LONG_BINGET", 0x6C: "LIST", 0x6F: "OBJ", 0x70: "PUT", 0x71: "BINPUT",
    0x72: "LONG_BINPUT", 0x73: "SETITEM", 0x74: "TUPLE", 0x75: "SETITEMS", 0x7D: "EMPTY_DICT",
    0x80: "PROTO", 0x81: "NEWOBJ", 0x82: "EXT1", 0x83: "EXT2", 0x84: "EXT4", 0x85: "TUPLE1",
    0x86: "TUPLE2", 0x87: "TUPLE3", 0x88: "NEWTRUE", 0x89: "NEWFALSE", 0x8A: "LONG1",
    0x8B: "LONG4", 0x8C: "SHORT_BINUNICODE", 0x8D: "BINUNICODE8", 0x8E: "BINBYTES8",
    0x8F: "EMPTY_SET", 0x90: "ADDITEMS", 0x91: "FROZENSET", 0x92: "NEWOBJ_EX",
    0x93: "STACK_GLOBAL", 0x94: "MEMOIZE", 0x95: "FRAME", 0x96: "BYTEARRAY8", 0x97: "NEXT_BUFFER",
    0x98: "READONLY_BUFFER",
}  # fmt: skip
