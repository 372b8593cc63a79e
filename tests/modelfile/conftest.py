"""Fixtures of the tests of the file format."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def unprivileged(tmp_path: Path) -> Iterator[None]:
    """Takes the right to `tmp_path` away, from root too."""
    user = os.geteuid()
    tmp_path.chmod(0)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        tmp_path.chmod(0o700)
