"""Optional data of the tests."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def shared_dir():
    """The folder of trained checkpoints beside the repository, or the one of GPTX_SHARED_DIR."""
    path = Path(os.environ.get("GPTX_SHARED_DIR", Path(__file__).parents[3] / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the data in {path} (GPTX_SHARED_DIR)")
    return path
