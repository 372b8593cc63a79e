"""Errors are values: they survive copies and the way between processes."""

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

import gptx
from gptx import errors

SAMPLES = [
    errors.ParameterError("top_k", -1, "an integer from 0"),
    errors.TokenIdError("prompt", 2, 999, 257),
    errors.TokenizeError("no tokenizer"),
    errors.ContextLengthError(800, 255, "shorten it", param="prompt[3]"),
    errors.ModelFileError("a.gptx", "magic", 0, "GPTX", b"abcd", "convert it"),
    errors.UnsafeCheckpointError("a.pt", "GLOBAL", "os.system", 17),
    errors.ConvertError("a shape is wrong", tensor="wte.weight"),
    errors.TrainingError("the loss is NaN"),
    errors.OutOfMemoryError("KV cache", 10**9, 10**8),
    errors.NonFiniteLogitsError("NaN"),
    errors.UnsupportedError("not here"),
    errors.DeviceError("no driver"),
    errors.MissingExtraError("gptx.guided", "llguidance", "guided"),
]


def test_every_error_is_among_the_samples():
    kinds = {e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, Exception)}
    assert {type(sample) for sample in SAMPLES} == kinds - {errors.GptxError}


@pytest.mark.parametrize("error", SAMPLES, ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("through", [lambda e: pickle.loads(pickle.dumps(e)), copy.deepcopy])
def test_an_error_survives_a_copy(error, through):
    copied = through(error)
    assert type(copied) is type(error)
    assert str(copied) == str(error)
    assert vars(copied) == vars(error)


def test_an_error_comes_out_of_a_worker_process():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        with pytest.raises(gptx.ParameterError, match="prompt: expected at least one token"):
            pool.submit(gptx.generate, "").result(timeout=60)
        failed = pool.submit(gptx.generate, "a", stop=3).exception(timeout=60)
    assert failed.param == "stop"
