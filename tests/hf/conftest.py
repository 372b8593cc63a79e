"""Models and tokenizers in folders as transformers saves them, opened by it and by gptx.hf."""

from __future__ import annotations

import pytest
from hf_samples import Pair, save_folder


@pytest.fixture(scope="session", params=["tied", "untied", "wide"])
def pair(request, tmp_path_factory):
    """A model with its tokenizer, here and in transformers."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share out
    folder = tmp_path_factory.mktemp("hf") / request.param
    save_folder(folder, request.param)
    yield Pair(folder)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with a model and a tokenizer."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_folder(folder, "tied")
    return folder
