"""Writing is all or nothing: whatever happens, the destination is the old file or the new one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from modelfile_samples import TINY, weights

from gptx import modelfile
from gptx.errors import ConvertError, ModelFileError, ParameterError
from gptx.modelfile import atomic

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="Linux only")


def _write(path: Path, seed: int = 0, **options: object) -> None:
    modelfile.write(path, TINY, weights(TINY, seed), **options)  # type: ignore[arg-type]


def _names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


class Failing(Mapping[str, np.ndarray]):
    """Tensors of which one raises instead."""

    def __init__(self, error: BaseException) -> None:
        self._tensors = weights(TINY, 1)
        self._error = error

    def __getitem__(self, name: str) -> np.ndarray:
        if name == "h.0.mlp.c_fc.weight":
            raise self._error
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(1), ValueError("no"), OSError(5)]
)
def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException
) -> None:
    path = tmp_path / "m.gptx"
    _write(path)
    before = path.read_bytes()
    with pytest.raises(type(error)):
        modelfile.write(path, TINY, Failing(error), force=True)
    assert path.read_bytes() == before
    assert _names(tmp_path) == ["m.gptx"]


def test_an_existing_file_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    path.write_text("precious")
    with pytest.raises(ParameterError, match="force: expected True to replace") as caught:
        _write(path)
    assert caught.value.param == "force"
    assert path.read_text() == "precious"
    _write(path, force=True)
    modelfile.verify(path)


def test_a_file_that_appears_meanwhile_is_kept_without_force(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    with pytest.raises(ParameterError, match="force"):
        _write(path, progress=lambda *_: path.write_text("precious"))
    assert path.read_text() == "precious"
    assert _names(tmp_path) == ["m.gptx"]


def test_a_file_system_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    _write(tmp_path / "m.gptx")
    modelfile.verify(tmp_path / "m.gptx")
    with pytest.raises(ParameterError, match="force"):
        _write(tmp_path / "n.gptx", progress=lambda *_: (tmp_path / "n.gptx").touch())
    assert _names(tmp_path) == ["m.gptx", "n.gptx"]


def test_a_symbolic_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link.gptx"
    link.symlink_to("real/m.gptx")
    _write(link)
    assert link.is_symlink()
    assert not (tmp_path / "real/m.gptx").is_symlink()
    modelfile.verify(link)
    modelfile.update(link, parity={"a": 1})
    assert link.is_symlink()
    assert modelfile.read(link).parity == {"a": 1}
    assert _names(tmp_path / "real") == ["m.gptx"]


def test_a_loop_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConvertError, match="cannot be written"):
        _write(tmp_path / "a", force=True)
    assert (tmp_path / "a").is_symlink()


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_only_a_regular_file_is_replaced(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "m.gptx"
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        path = Path("/dev/null")
    with pytest.raises(ParameterError, match="a regular file"):
        _write(path, force=True)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_the_mode_follows_the_umask(tmp_path: Path, umask: int) -> None:
    old = os.umask(umask)
    try:
        _write(tmp_path / "m.gptx")
    finally:
        os.umask(old)
    assert (tmp_path / "m.gptx").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_missing_folder_is_an_error_with_its_errno(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="ENOENT") as caught:
        _write(tmp_path / "missing" / "m.gptx")
    assert isinstance(caught.value.__cause__, OSError)
    (tmp_path / "file").touch()
    with pytest.raises(ConvertError, match="ENOTDIR"):
        _write(tmp_path / "file" / "m.gptx")


def test_a_folder_without_permission_is_an_error_with_its_errno(
    tmp_path: Path, unprivileged: None
) -> None:
    with pytest.raises(ConvertError, match="EACCES"):
        _write(tmp_path / "m.gptx")


def test_too_little_room_is_said_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = SimpleNamespace(f_bavail=10, f_frsize=100)
    monkeypatch.setattr(os, "statvfs", lambda _: disk)
    steps: list[object] = []
    with pytest.raises(ConvertError, match=r"needs 12,\d\d\d bytes, 1,000 are free") as caught:
        _write(tmp_path / "m.gptx", progress=lambda *step: steps.append(step))
    assert "ENOSPC" in str(caught.value)
    assert steps == []
    assert _names(tmp_path) == []


def test_a_failing_disk_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gptx"
    _write(path)
    before = path.read_bytes()

    def fail(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ConvertError, match=r"Input/output error \(EIO\)"):
        _write(path, 1, force=True)
    assert path.read_bytes() == before
    assert _names(tmp_path) == ["m.gptx"]


def test_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def record_sync(fd: int) -> None:
        events.append("sync folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "sync file")  # noqa: PTH112
        fsync(fd)

    def record_replace(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(Path, "replace", record_replace)
    _write(tmp_path / "m.gptx", force=True)
    assert events == ["sync file", "rename", "sync folder"]


def test_only_old_parts_of_the_same_file_are_removed(tmp_path: Path) -> None:
    stale = tmp_path / ".m.gptx-0123abcd.part"
    fresh = tmp_path / ".m.gptx-0123abce.part"
    others = [tmp_path / ".n.gptx-0123abcd.part", tmp_path / ".m.gptx-xyz.part"]
    for part in (stale, fresh, *others):
        part.touch()
    for part in (stale, *others):
        os.utime(part, (time.time() - 7200,) * 2)
    _write(tmp_path / "m.gptx")
    assert not stale.exists()
    assert all(part.exists() for part in (fresh, *others))


def test_a_name_of_greatest_length_works(tmp_path: Path) -> None:
    path = tmp_path / ("m" * 250 + ".gptx")
    _write(path)
    modelfile.verify(path)


def _child(code: str, *arguments: object) -> list[str]:
    program = "import sys; from modelfile_samples import *; from gptx import modelfile\n" + code
    return [sys.executable, "-c", program, *map(str, arguments)]


def _environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@linux_only
def test_a_limit_on_the_file_size_is_an_error_with_its_errno(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    _write(path)
    before = path.read_bytes()
    code = """
import resource
from gptx.errors import ConvertError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    modelfile.write(sys.argv[1], TINY, weights(TINY, 1), force=True)
except ConvertError as error:
    print(error)
"""
    output = subprocess.run(
        _child(code, path), env=_environment(), capture_output=True, text=True, check=True
    )
    assert "(EFBIG)" in output.stdout
    assert path.read_bytes() == before
    assert _names(tmp_path) == ["m.gptx"]


@linux_only
def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20k", "tmpfs", tmp_path],
        capture_output=True,
        check=False,
    )
    if mounted.returncode != 0:
        pytest.skip("a tmpfs cannot be mounted here")
    try:
        path = tmp_path / "m.gptx"
        _write(path)
        before = path.read_bytes()
        with pytest.raises(ConvertError, match=r"needs .* are free"):
            _write(path, 1, force=True)
        huge = SimpleNamespace(f_bavail=2**60, f_frsize=1)
        monkeypatch.setattr(os, "statvfs", lambda _: huge)
        with pytest.raises(ConvertError, match=r"No space left on device \(ENOSPC\)"):
            _write(path, 1, force=True)
        assert path.read_bytes() == before
        assert _names(tmp_path) == ["m.gptx"]
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


@linux_only
@pytest.mark.slow
def test_a_killed_writer_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    contents = []
    for seed in (1, 0):
        _write(path, seed, force=True)
        contents.append(path.read_bytes())
    code = """
tensors = [weights(TINY, 0), weights(TINY, 1)]
print("ready", flush=True)
for i in range(10**6):
    modelfile.write(sys.argv[1], TINY, tensors[i % 2], force=True)
"""
    found = set()
    for attempt in range(25):
        child = subprocess.Popen(
            _child(code, path), env=_environment(), stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        time.sleep(0.003 + 0.00173 * attempt)
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        assert path.read_bytes() in contents
        modelfile.verify(path)
        found.update(name for name in _names(tmp_path) if name != "m.gptx")
    for part in found:
        assert atomic.AtomicFile(path, 0, force=True)._pattern.fullmatch(part)
        os.utime(tmp_path / part, (0, 0))
    _write(path, force=True)
    assert _names(tmp_path) == ["m.gptx"]


@linux_only
def test_a_writer_killed_at_each_step_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    """The steps of one write, each with the process ended just before it."""
    path = tmp_path / "m.gptx"
    code = """
import os
from pathlib import Path
from types import SimpleNamespace
from gptx.modelfile import atomic
step, wanted = 0, int(sys.argv[2])
def die_at(function):
    def wrapped(*arguments, **options):
        global step
        step += 1
        if step == wanted:
            os._exit(9)
        return function(*arguments, **options)
    return wrapped
os.fsync = die_at(os.fsync)
os.open = die_at(os.open)
Path.replace = die_at(Path.replace)
Path.unlink = die_at(Path.unlink)
atomic.AtomicFile.write = die_at(atomic.AtomicFile.write)
modelfile.write(sys.argv[1], TINY, weights(TINY, 1), force=True)
"""
    contents = []
    for seed in (1, 0):
        _write(path, seed, force=True)
        contents.append(path.read_bytes())
    steps = 0
    ended = 9
    while ended == 9:
        path.write_bytes(contents[1])
        steps += 1
        ended = subprocess.run(
            _child(code, path, steps), env=_environment(), check=False
        ).returncode
        assert path.read_bytes() in contents
    assert ended == 0
    assert path.read_bytes() == contents[0]
    assert steps > 20


def test_an_update_of_a_damaged_header_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m.gptx"
    _write(path)
    data = bytearray(path.read_bytes())
    data[200] ^= 1
    path.write_bytes(data)
    with pytest.raises(ModelFileError):
        modelfile.update(path, parity={})
    assert path.read_bytes() == data
    assert _names(tmp_path) == ["m.gptx"]
