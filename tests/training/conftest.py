"""A small corpus and small runs for the tests of training."""

import pytest
import torch
from training_samples import TINY, make_text

from gptx.training.options import TrainOptions


@pytest.fixture(autouse=True)
def torch_threads():
    """A run sets the threads of torch for the whole process; other tests keep theirs."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(tmp_path):
    """Two text files of 400 and 300 documents."""
    paths = []
    for name, n_documents in (("tales.txt", 400), ("poems.txt", 300)):
        paths.append(tmp_path / name)
        paths[-1].write_text(make_text(n_documents, seed=n_documents), encoding="utf-8")
    return paths


@pytest.fixture
def tiny_options(corpus, tmp_path):
    """Makes options of a run that takes a second."""

    def make(**changes):
        values = {"data": tuple(map(str, corpus)), "out": str(tmp_path / "out")} | TINY | changes
        return TrainOptions(**values)

    return make
