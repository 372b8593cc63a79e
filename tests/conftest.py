"""Data that is not part of the repository and that tests use where it is at hand."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

# A shell that starts the tests in the background has them ignore Ctrl-C, and so their children.
signal.signal(signal.SIGINT, signal.default_int_handler)


def _shared() -> Path:
    default = Path(__file__).resolve().parents[2] / "shared"
    return Path(os.environ.get("GPTX_SHARED", default))


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of optional data: $GPTX_SHARED, else ``shared`` beside the repository."""
    folder = _shared()
    if not folder.is_dir():
        pytest.skip(f"optional test data: no folder {folder.name} beside the repository")
    return folder


@pytest.fixture(scope="session", autouse=True)
def _tiktoken_cache() -> None:
    """Lets tiktoken find GPT-2's vocabulary without the network."""
    folder = _shared() / "tiktoken"
    if folder.is_dir():
        os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(folder))
