"""Things that are not model files, and files that change under the reader's hands."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from modelfile_samples import TINY, weights

from gptx import modelfile
from gptx.errors import ModelFileError
from gptx.modelfile import reader


@pytest.fixture
def path(tmp_path: Path) -> Path:
    modelfile.write(tmp_path / "m.gptx", TINY, weights(TINY))
    return tmp_path / "m.gptx"


def _read(path: Path) -> ModelFileError:
    begin = time.monotonic()
    with pytest.raises(ModelFileError) as caught:
        modelfile.read(path)
    assert time.monotonic() - begin < 1
    assert str(path) in str(caught.value)
    return caught.value


def test_a_folder_a_fifo_and_a_device_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path, found in (
        (tmp_path, "a directory"),
        (tmp_path / "fifo", "a FIFO"),
        (Path("/dev/zero"), "a device"),
    ):
        error = _read(path)
        assert (error.field, error.found) == ("file type", found)


def test_a_socket_is_not_a_file(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert _read(tmp_path / "s").field == "file type"


def test_an_empty_file_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "m.gptx").touch()
    error = _read(tmp_path / "m.gptx")
    assert (error.field, error.offset, error.found) == ("file size", 0, 0)


def test_a_missing_file_is_a_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        modelfile.read(tmp_path / "missing.gptx")


def test_a_file_without_permission_is_a_permission_error(path: Path, unprivileged: None) -> None:
    with pytest.raises(PermissionError):
        modelfile.read(path)


def test_symbolic_links_are_followed_and_broken_ones_not_found(path: Path) -> None:
    link = path.with_name("link")
    link.symlink_to(path.name)
    assert modelfile.read(link).config == TINY
    path.unlink()
    with pytest.raises(FileNotFoundError):
        modelfile.read(link)


def test_a_sparse_terabyte_is_refused_at_once(path: Path, tmp_path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(1 << 40)
    error = _read(path)
    assert (error.field, error.found) == ("file size", 1 << 40)
    with (tmp_path / "zeros").open("wb") as file:
        file.truncate(1 << 40)
    assert _read(tmp_path / "zeros").field == "header_length"


def test_a_path_with_odd_characters_works(path: Path) -> None:
    for name in ("with space", "ünï 模型", "new\nline", os.fsdecode(b"\xff\xfe")):
        odd = path.with_name(name)
        odd.write_bytes(path.read_bytes())
        assert modelfile.read(odd).config == TINY
        assert modelfile.read(str(odd)).path == odd


def test_a_file_swapped_after_its_header_was_judged_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = path.with_name("other")
    modelfile.write(other, TINY, weights(TINY, 1))
    parse = reader.parse_header

    def swap(*arguments: object) -> object:
        header = parse(*arguments)  # type: ignore[arg-type]
        other.replace(path)
        return header

    monkeypatch.setattr(reader, "parse_header", swap)
    assert "replaced while it was opened" in str(_read(path))


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_file_cut_after_its_header_was_judged_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    parse = reader.parse_header

    def cut(*arguments: object) -> object:
        header = parse(*arguments)  # type: ignore[arg-type]
        os.truncate(path, size)
        return header

    monkeypatch.setattr(reader, "parse_header", cut)
    error = _read(path)
    assert (error.field, error.found) == ("file size", size)


def test_reading_leaves_no_file_open_and_no_memory_behind(path: Path) -> None:
    descriptors = Path("/proc/self/fd")
    if not descriptors.exists():
        pytest.skip("needs /proc")
    maps = Path("/proc/self/maps")
    before = len(list(descriptors.iterdir()))
    for _ in range(50):
        modelfile.read(path)
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    for _ in range(50):
        _read(path)
    assert len(list(descriptors.iterdir())) == before
    gc.collect()
    assert maps.read_text().count(str(path)) <= 1


@pytest.mark.skipif(sys.platform != "linux", reason="Linux only")
def test_a_hostile_header_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "bomb"
    length = 2**22 - 8
    text = ('{"__metadata__":{"checksums":"' + '[],\\"a\\":' * 2**20)[:length]
    path.write_bytes(length.to_bytes(8, "little") + text.encode())
    code = """
import resource, sys
from gptx import modelfile
from gptx.errors import ModelFileError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    modelfile.read(sys.argv[1])
except ModelFileError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    output = subprocess.run(
        [sys.executable, "-c", code, path],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(output.stdout) < 64 << 10
