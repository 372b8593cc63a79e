"""The pickle interpreter: what it reads, and that everything else is refused and runs nothing."""

import collections
import contextlib
import pickle
import pickletools
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pickle_programs import PROTO, STOP, name, number, short_text, text, tuple_of

from gptx.checkpoints.pickle_reader import _HANDLERS, _NAMES, Constructor, OrderedDict, read_pickle
from gptx.checkpoints.torch_file import _PLAIN
from gptx.errors import ModelFileError, UnsafeCheckpointError

SYSTEM = "posix system"


def read(data):
    return read_pickle(data, "x.pt", _PLAIN)


keys = st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**31) + 1, 2**31 - 1)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**200), 2**200)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
    | st.binary()
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner, max_size=5).map(tuple)
    ),
    max_leaves=20,
)


@given(values, st.integers(2, 5))
@settings(max_examples=200, deadline=None)
def test_plain_values_read_as_pickle_reads_them(value, protocol):
    found = read(pickle.dumps(value, protocol=protocol))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_values_of_training_scripts_read(protocol):
    value = {
        "loss": np.float32(1.5),
        "best": np.float64(0.25),
        "step": np.int64(7),
        "flag": np.bool_(True),
        "raw": b"\x00\xff",
        "order": collections.OrderedDict([("b", 1), ("a", 2)]),
    }
    found = read(pickle.dumps(value, protocol=protocol))
    assert found == {**value, "order": {"b": 1, "a": 2}}
    assert type(found["loss"]) is float
    assert type(found["step"]) is int
    assert list(found["order"]) == ["b", "a"]


def test_the_character_table_of_nanogpt_reads():
    chars = sorted(set("hello, 世界!\n"))
    meta = {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    for protocol in (2, 3, 4, 5):
        assert read_pickle(pickle.dumps(meta, protocol=protocol), "meta.pkl") == meta


def test_every_opcode_has_its_name_and_only_the_listed_ones_run():
    assert {ord(op.code): op.name for op in pickletools.opcodes} == _NAMES
    allowed = {_NAMES[code] for code in _HANDLERS} | {"STOP"}
    assert allowed == {
        "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE",
        "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE",
        "BINBYTES", "SHORT_BINBYTES", "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3",
        "EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_DICT", "SETITEM", "SETITEMS",
        "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET",
        "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "BINPERSID",
    }  # fmt: skip


# name -> (program, refused opcode, refused global)
HOSTILE = {
    "global": (PROTO + name("posix", "system") + text("id") + b"\x85R" + STOP, "GLOBAL", SYSTEM),
    "global without a call": (PROTO + name("posix", "system") + STOP, "GLOBAL", SYSTEM),
    "protocol 0": (b"cposix\nsystem\n(S'id'\ntR.", "GLOBAL", SYSTEM),
    "protocol 0 dict": (b"(dp0\nS'a'\np1\ncposix\nsystem\n(S'id'\ntRs.", "DICT", None),
    "stack global": (
        b"\x80\x04" + short_text("posix") + short_text("system") + b"\x93" + STOP,
        "STACK_GLOBAL",
        SYSTEM,
    ),
    "stack global from the memo": (
        b"\x80\x04" + short_text("posix") + b"\x94" + short_text("system") + b"\x94}h\0h\1\x93.",
        "STACK_GLOBAL",
        SYSTEM,
    ),
    "stack global of numbers": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL", "1"),
    "dotted name": (
        PROTO + name("collections", "OrderedDict.__init__") + STOP,
        "GLOBAL",
        "collections OrderedDict.__init__",
    ),
    "dotted module": (
        PROTO + name("torch._utils.os", "system") + STOP,
        "GLOBAL",
        "torch._utils.os system",
    ),
    "space in the module": (
        b"\x80\x04" + short_text("") + short_text("collections OrderedDict") + b"\x93.",
        "STACK_GLOBAL",
        " collections OrderedDict",
    ),
    "space in the name": (
        PROTO + b"ccollections OrderedDict\n\n" + STOP,
        "GLOBAL",
        "collections OrderedDict ",
    ),
    "inst": (PROTO + b"(" + text("id") + b"iposix\nsystem\n.", "INST", SYSTEM),
    "inst cut short": (PROTO + b"(" + text("id") + b"iposix", "INST", None),
    "obj": (PROTO + b"(" + name("collections", "OrderedDict") + b"o.", "OBJ", None),
    "newobj": (
        PROTO + name("collections", "OrderedDict") + b")\x81.",
        "NEWOBJ",
        "collections.OrderedDict",
    ),
    "newobj_ex": (
        b"\x80\x04" + name("collections", "OrderedDict") + b")}\x92.",
        "NEWOBJ_EX",
        "collections.OrderedDict",
    ),
    "ext1": (PROTO + b"\x82\x07.", "EXT1", "extension 7"),
    "ext2": (PROTO + b"\x83\x07\x01.", "EXT2", "extension 263"),
    "ext4": (PROTO + b"\x84\x01\x00\x00\x00.", "EXT4", "extension 1"),
    "persid": (PROTO + b"Pposix.system\n.", "PERSID", "posix.system"),
    "binpersid in plain data": (PROTO + text("x") + b"Q.", "BINPERSID", "'x'"),
    "reduce of a string": (PROTO + text("posix.system") + b")R.", "REDUCE", "'posix.system'"),
    "reduce of a storage type": (
        PROTO + name("torch", "FloatStorage") + b")R.",
        "REDUCE",
        "_StorageType",
    ),
    "reduce without a tuple": (
        PROTO + name("collections", "OrderedDict") + b"]R.",
        "REDUCE",
        "collections.OrderedDict",
    ),
    "ordered dict with arguments": (
        PROTO + name("collections", "OrderedDict") + b"]\x85R.",
        "REDUCE",
        "collections.OrderedDict",
    ),
    "codecs other than latin1": (
        PROTO + name("_codecs", "encode") + text("x") + text("rot13") + b"\x86R.",
        "REDUCE",
        "_codecs.encode",
    ),
    "numpy objects": (
        PROTO + name("numpy", "dtype") + text("O8") + b"\x89\x88\x87R.",
        "REDUCE",
        "numpy.dtype",
    ),
    "numpy scalar of the wrong size": (
        PROTO
        + name("numpy.core.multiarray", "scalar")
        + name("numpy", "dtype") + text("f8") + b"\x89\x88\x87R"
        + b"C\x01x\x86R.",
        "REDUCE",
        "numpy.core.multiarray.scalar",
    ),
    "numpy arrays": (
        PROTO + name("numpy.core.multiarray", "_reconstruct") + STOP,
        "GLOBAL",
        "numpy.core.multiarray _reconstruct",
    ),
    "build of a constructor": (
        PROTO + name("collections", "OrderedDict") + b"}" + text("build") + text("x") + b"sb.",
        "BUILD",
        "collections.OrderedDict",
    ),
    "build of a dict": (PROTO + b"}}b.", "BUILD", "dict of 0"),
    "build with __setstate__": (
        PROTO
        + name("collections", "OrderedDict") + b")R"
        + b"}" + text("__setstate__") + name("torch", "Size") + b"sb.",
        "BUILD",
        "OrderedDict of 0",
    ),
    "build with slots": (
        PROTO + name("collections", "OrderedDict") + b")RN}\x86b.",
        "BUILD",
        "OrderedDict of 0",
    ),
    "append to a dict": (PROTO + b"}K\x01a.", "APPEND", "dict of 0"),
    "setitem on a list": (PROTO + b"]K\x01K\x02s.", "SETITEM", "list of 0"),
    "setitem on a constructor": (
        PROTO + name("torch", "Size") + text("build") + text("x") + b"s.",
        "SETITEM",
        "torch.Size",
    ),
    "the rest of the stream after a refusal": (
        PROTO + name("builtins", "eval") + b"\xff\xff\xff",
        "GLOBAL",
        "builtins eval",
    ),
    "an unknown opcode": (PROTO + b"\xff.", "0xff", None),
    "pop": (PROTO + b"NN0.", "POP", None),
    "dup": (PROTO + b"N2.", "DUP", None),
    "sets": (b"\x80\x04\x8f.", "EMPTY_SET", None),
    "out-of-band buffers": (b"\x80\x05\x97.", "NEXT_BUFFER", None),
    "long4": (PROTO + b"\x8b\x01\x00\x00\x00\x01.", "LONG4", None),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: case.replace(" ", "-"))
def test_a_hostile_pickle_is_refused_by_name(case):
    program, opcode, refused = HOSTILE[case]
    with pytest.raises(UnsafeCheckpointError) as caught:
        read(program)
    assert caught.value.opcode == opcode
    assert caught.value.name == refused
    assert program[caught.value.offset] == next(
        (code for code, known in _NAMES.items() if known == opcode), 0xFF
    )
    assert "torch.save(model.state_dict()" in str(caught.value)


MODULES = """
os system | posix system | nt system | os popen | os execv | subprocess Popen
subprocess check_output | builtins eval | builtins exec | builtins compile | builtins open
builtins getattr | builtins __import__ | __builtin__ eval | importlib import_module
runpy _run_code | code InteractiveInterpreter | pty spawn | pickle loads | _pickle loads
marshal loads | types FunctionType | types CodeType | operator attrgetter | operator methodcaller
functools partial | socket socket | shutil rmtree | webbrowser open | ctypes CDLL | torch load
torch.hub load | torch.jit.unsupported_tensor_ops execWrapper
numpy.testing._private.utils runstring | pip main | asyncio.unix_events _UnixSubprocessTransport
pydoc pipepager | timeit timeit | idlelib.pyshell ModifiedInterpreter
lib2to3.pgen2.pgen ParserGenerator | distutils.file_util write_file | cProfile runctx
profile Profile | doctest debug_script | bdb Bdb | trace Trace | uuid _get_command_stdout
torch._utils _rebuild_device_tensor_from_numpy | torch._utils _import_dotted_name
torch.storage _load_from_bytes | torch._tensor _rebuild_from_type_v2
torch._utils _rebuild_wrapper_subclass | torch.nn.modules.linear Linear | __main__ GPT
argparse Namespace | pathlib PosixPath | collections defaultdict | _collections OrderedDict
__builtin__ set | copyreg _reconstructor
"""
MODULES = [entry.strip() for line in MODULES.strip().splitlines() for entry in line.split("|")]


@pytest.mark.parametrize("target", MODULES)
def test_a_global_that_can_do_harm_is_refused_in_both_spellings(target):
    module, attribute = target.split()
    for program, opcode in (
        (PROTO + name(module, attribute) + b")R.", "GLOBAL"),
        (b"\x80\x04" + short_text(module) + short_text(attribute) + b"\x93)R.", "STACK_GLOBAL"),
    ):
        with pytest.raises(UnsafeCheckpointError) as caught:
            read(program)
        assert (caught.value.opcode, caught.value.name) == (opcode, target)


DAMAGED = {
    "nothing": b"",
    "no end": PROTO + b"N",
    "nothing on the stack": PROTO + b".",
    "two values": PROTO + b"NN.",
    "an open mark": PROTO + b"N(.",
    "bytes after the end": PROTO + b"N.N.",
    "protocol 6": b"\x80\x06N.",
    "protocol 1": b"\x80\x01N.",
    "no protocol": b"N.",
    "protocol twice": PROTO + PROTO + b"N.",
    "a frame past the end": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
    "text past the end": PROTO + b"X\xff\xff\xff\xffa",
    "text that is not UTF-8": PROTO + b"X\x01\x00\x00\x00\xff.",
    "a surrogate": PROTO + b"X\x03\x00\x00\x00\xed\xa0\x80.",
    "a memo index never put": PROTO + b"h\x05.",
    "a huge memo index": PROTO + b"Nr\xff\xff\xff\xff.",
    "put of nothing": PROTO + b"q\x00.",
    "a tuple through a mark": PROTO + b"N(\x85.",
    "a tuple without a mark": PROTO + b"t.",
    "one key and no value": PROTO + b"}(K\x01u.",
    "a key twice": PROTO + b"}(K\x01NK\x01Nu.",
    "a list as a key": PROTO + b"}]Ns.",
    "a tuple as a key": PROTO + b"})Ns.",
    "a float as a key": PROTO + b"}G" + bytes(8) + b"Ns.",
    "a wide int as a key": PROTO + b"}\x8a\x05\x00\x00\x00\x00\x01Ns.",
    "a global without a newline": PROTO + b"c" + b"x" * 2000,
}


@pytest.mark.parametrize("case", DAMAGED, ids=lambda case: case.replace(" ", "-"))
def test_a_malformed_pickle_names_its_offset(case):
    with pytest.raises(ModelFileError) as caught:
        read(DAMAGED[case])
    assert caught.value.field == "pickle"
    assert 0 <= caught.value.offset <= len(DAMAGED[case])


def test_the_metadata_of_a_state_dict_is_dropped():
    ordered = name("collections", "OrderedDict") + b")R"
    program = ordered + b"}" + text("_metadata") + ordered + b"sb"
    found = read(PROTO + program + STOP)
    assert found == {}
    assert type(found) is OrderedDict
    assert not hasattr(found, "_metadata")


def bombs():
    yield "deep lists", PROTO + b"]" * 90_000 + b"a" * 89_999 + STOP, True
    yield "deep tuples", PROTO + b"N" + b"\x85" * 900_000 + STOP, True
    yield "stack", PROTO + b"N" * 200_000 + STOP, False
    yield "marks", PROTO + b"(" * 200_000 + STOP, False
    yield "memo", PROTO + b"N" + b"\x94" * 600_000 + STOP, False
    yield "opcodes", PROTO + b"]" + b"Na" * 600_000 + STOP, False
    yield "size", PROTO + b"B" + (17 << 20).to_bytes(4, "little") + bytes(17 << 20) + STOP, False
    laughs = b"]" + b"\x94(" + b"h\x00" * 50 + b"e"
    yield "a list of itself", PROTO + laughs + STOP, True


@pytest.mark.parametrize(
    ("case", "program", "fine"), list(bombs()), ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_bomb_costs_bounded_time_and_does_not_recurse(case, program, fine):
    start = time.monotonic()
    if fine:
        read(program)
    else:
        with pytest.raises(ModelFileError):
            read(program)
    assert time.monotonic() - start < 10


@given(st.binary(max_size=200))
@settings(max_examples=500, deadline=None)
def test_random_bytes_give_a_value_or_one_of_two_errors(data):
    with contextlib.suppress(UnsafeCheckpointError, ModelFileError):
        read(PROTO + data)


def test_constructors_are_the_only_things_that_are_called():
    called = []
    table = {"a b": Constructor("a.b", lambda args: called.append(args))}
    assert read_pickle(PROTO + name("a", "b") + tuple_of(number(1)) + b"R.", "x", table) is None
    assert called == [(1,)]


CANARY = """
import sys
from gptx.checkpoints.pickle_reader import read_pickle
from gptx.checkpoints.torch_file import _PLAIN
from gptx.errors import GptxError
import encodings.latin_1
programs = [bytes.fromhex(line) for line in sys.stdin.read().split()]
seen, watching = [], False
allowed = ("object.__getattr__", "sys._getframe")
def hook(event, args):
    if watching and event not in allowed:
        seen.append((event, str(args)[:200]))
sys.addaudithook(hook)
refused = 0
before = set(sys.modules)
for program in programs:
    watching = True
    try:
        read_pickle(program, "x", _PLAIN)
    except GptxError:
        refused += 1
    watching = False
assert not seen, seen
assert set(sys.modules) == before, set(sys.modules) - before
assert "torch" not in sys.modules and "pickle" not in vars(sys.modules["gptx.checkpoints"])
print(refused)
"""


def test_hostile_pickles_execute_nothing():
    programs = [case[0] for case in HOSTILE.values()]
    programs += [
        PROTO + name(*target.split()) + text("touch /tmp/x") + b"\x85R." for target in MODULES
    ]
    result = subprocess.run(
        [sys.executable, "-c", CANARY],
        input="\n".join(program.hex() for program in programs),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(programs)
