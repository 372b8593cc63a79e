"""Classification heads: from transformers' checkpoints through the file to its own logits."""

import json
import math
import random

import numpy as np
import pytest

import gptx
from gptx import modelfile
from gptx.config import MULTI_LABEL, PROBLEM_TYPES, REGRESSION, SINGLE_LABEL, GPTConfig
from gptx.convert import convert, main
from gptx.errors import (
    ContextLengthError,
    ConvertError,
    ModelFileError,
    ParameterError,
    UnsupportedError,
)
from models import byte_tokenizer_spec, make_config, random_tensors, write_model

TEXTS = ["A wonderful tale.", "x", "Dull, long and sad: " * 3, "床前明月光"]
LABELS = ("bad", "good", "与众不同")
TINY = dict(vocab_size=20, block_size=4, n_layer=1, n_head=1, n_embd=16, n_inner=16)


def twin(labels, problem_type=None, **changes):
    """transformers' model with random weights, its head away from zero."""
    torch = pytest.importorskip("torch")
    from transformers import GPT2Config, GPT2ForSequenceClassification

    torch.manual_seed(len(labels))
    model = GPT2ForSequenceClassification(
        GPT2Config(
            **{
                "vocab_size": 260,
                "n_positions": 96,
                "n_layer": 2,
                "n_head": 2,
                "n_embd": 32,
                "id2label": dict(enumerate(labels)),
                "label2id": {label: i for i, label in enumerate(labels)},
                "problem_type": problem_type,
                "pad_token_id": 258,
                "bos_token_id": 256,
                "eos_token_id": 256,
                "initializer_range": 0.2,
            }
            | changes
        )
    )
    return model.eval()


def converted(folder, model, dtype="float32"):
    """The checkpoint that transformers writes, as a .gptx file."""
    model.save_pretrained(folder / "hf")
    return convert(
        folder / "hf", folder / "m.gptx", dtype=dtype, tokenizer=byte_tokenizer_spec(), verify=True
    )


def padded_logits(model, texts):
    import torch

    ids = [list(text.encode()) for text in texts]
    width = max(map(len, ids))
    rows = torch.tensor([row + [258] * (width - len(row)) for row in ids])
    with torch.no_grad():
        return model(rows, attention_mask=(rows != 258).long()).logits.numpy()


@pytest.mark.parametrize(
    ("labels", "problem_type"),
    [
        *((LABELS, problem_type) for problem_type in (None, *PROBLEM_TYPES)),
        *((("only",), problem_type) for problem_type in (None, MULTI_LABEL, REGRESSION)),
    ],
)
def test_logits_and_probabilities_are_those_of_transformers(tmp_path, labels, problem_type):
    theirs = twin(labels, problem_type)
    model = gptx.load(converted(tmp_path, theirs))
    assert model.config.labels == labels
    expected_type = problem_type or (REGRESSION if len(labels) == 1 else SINGLE_LABEL)
    assert model.config.problem_type == expected_type
    logits = padded_logits(theirs, TEXTS)
    found = model.classify(TEXTS)
    for row, result in zip(logits, found, strict=True):
        assert result.logits.dtype == np.float32
        assert np.abs(result.logits - row).max() < 1e-4
        values = row.astype(float)
        if expected_type == SINGLE_LABEL:
            values = np.exp(values) / np.exp(values).sum()
        elif expected_type == MULTI_LABEL:
            values = 1 / (1 + np.exp(-values))
        assert list(result.probabilities) == list(labels)
        assert np.allclose(list(result.probabilities.values()), values, atol=1e-4)
        assert str(result) == result.label == labels[int(np.argmax(row))]
        if expected_type == MULTI_LABEL:
            assert result.labels == tuple(x for x, p in result.probabilities.items() if p >= 0.5)
        elif expected_type == SINGLE_LABEL:
            assert result.labels == (result.label,)


def test_a_text_has_the_same_logits_alone_and_in_a_batch(tmp_path):
    model = gptx.load(converted(tmp_path, twin(LABELS)))
    for text, together in zip(TEXTS, model.classify(TEXTS), strict=True):
        alone = model.classify(text)
        assert np.array_equal(alone.logits, together.logits)
        assert np.array_equal(model.classify(list(text.encode())).logits, alone.logits)


def test_padding_behind_a_text_is_not_read(tmp_path):
    theirs = twin(LABELS)
    theirs.save_pretrained(tmp_path / "hf")
    model = gptx.load(tmp_path / "hf")
    ids = list(TEXTS[0].encode())
    assert np.array_equal(model.classify([*ids, 258, 258]).logits, model.classify(ids).logits)
    found = model.classify([258, 258]).logits
    import torch

    with torch.no_grad():
        expected = theirs(torch.tensor([[258, 258]])).logits[0].numpy()
    assert np.abs(found - expected).max() < 1e-4


def test_a_checkpoint_loaded_as_it_is_has_the_same_head(tmp_path):
    theirs = twin(LABELS)
    model = gptx.load(converted(tmp_path, theirs))
    direct = gptx.load(tmp_path / "hf")
    ids = list(TEXTS[0].encode())
    assert np.array_equal(direct.classify(ids).logits, model.classify(ids).logits)


def test_such_a_model_still_generates(tmp_path):
    model = gptx.load(converted(tmp_path, twin(LABELS)))
    assert model.config.tie_word_embeddings
    assert model.generate("Once", temperature=0, max_new_tokens=5).completion_tokens == 5
    assert model.parity["max_logit_difference"] < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_head_is_never_rounded(tmp_path, dtype):
    theirs = twin(LABELS)
    path = converted(tmp_path, theirs, dtype)
    file = modelfile.verify(path)
    assert np.array_equal(file.weight("score.weight"), theirs.score.weight.detach().numpy())
    found = np.stack([result.logits for result in gptx.load(path).classify(TEXTS)])
    logits = padded_logits(theirs, TEXTS)
    assert np.abs(found - logits).max() < 0.2 * np.abs(logits).max()


def test_a_model_without_a_head_names_the_alternative(tmp_path):
    write_model(tmp_path / "m.gptx")
    with pytest.raises(UnsupportedError, match=r"gptx\.tasks\.classify"):
        gptx.load(tmp_path / "m.gptx").classify("text")


def test_texts_are_checked_as_everywhere(tmp_path):
    model = gptx.load(converted(tmp_path, twin(LABELS)))
    for text, error in [
        ("", ParameterError),
        ([], ParameterError),
        (["a" * 97], ContextLengthError),
    ]:
        with pytest.raises(error):
            model.classify(text)
    assert model._engine.stats()["requests"] == 0


def change_config(folder, **changes):
    path = folder / "hf" / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not ...}))


def test_labels_that_are_not_named_are_numbered(tmp_path):
    twin(("LABEL_0", "LABEL_1")).save_pretrained(tmp_path / "hf")
    change_config(tmp_path, id2label=..., problem_type=None)
    assert gptx.load(tmp_path / "hf").config.labels == ("LABEL_0", "LABEL_1")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label: expected the ids 0 to 2"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "labels: expected distinct"),
        ({"id2label": {"0": "a", "1": "b", "2": 3}}, "labels: expected distinct"),
        ({"id2label": ["a", "b", "c"]}, "id2label"),
        ({"problem_type": "ranking"}, "problem_type: expected one of single_label"),
    ],
)
def test_labels_that_do_not_fit_the_head_are_refused(tmp_path, changes, message):
    twin(LABELS).save_pretrained(tmp_path / "hf")
    change_config(tmp_path, **changes)
    with pytest.raises(ConvertError, match=message):
        convert(tmp_path / "hf", tmp_path / "m.gptx", tokenizer="none", verify=False)


def test_a_head_without_lm_head_ties_with_a_note(tmp_path, capsys):
    twin(LABELS).save_pretrained(tmp_path / "hf")
    change_config(tmp_path, tie_word_embeddings=False)
    assert main([str(tmp_path / "hf"), "--tokenizer", "none", "--no-parity"]) == 0
    shown = capsys.readouterr().out
    assert "note: no lm_head beside the classification head" in shown
    assert "classification head: 'bad', 'good', '与众不同' (single_label_classification)" in shown


def test_the_command_uses_the_head_where_no_labels_are_given(tmp_path):
    from test_cli import gptx_command

    path = converted(tmp_path, twin(LABELS))
    model = gptx.load(path)
    found = gptx_command("classify", "-m", path, *TEXTS[:2], "--json")
    lines = [json.loads(line) for line in found.stdout.splitlines()]
    for line, result in zip(lines, model.classify(TEXTS[:2]), strict=True):
        assert line["probabilities"] == result.probabilities
        assert line["logits"] == result.logits.tolist()


# -- the file


def head_file(path, dtype="float32", labels=LABELS, problem_type=SINGLE_LABEL, **shape):
    config = make_config(**(TINY | shape), labels=labels, problem_type=problem_type)
    modelfile.write(path, config, random_tensors(config), dtype=dtype)
    return config


def test_a_head_is_one_more_tensor_at_the_end_and_two_more_values(tmp_path):
    config = head_file(tmp_path / "m.gptx", tie_word_embeddings=False, n_embd=20)
    data = (tmp_path / "m.gptx").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert list(header)[-1] == "score.weight"
    assert header["score.weight"]["dtype"] == "F32"
    assert header["score.weight"]["shape"] == [3, 32]
    values = json.loads(header["__metadata__"]["config"])
    assert values["labels"] == list(LABELS)
    assert values["problem_type"] == SINGLE_LABEL
    found = modelfile.verify(tmp_path / "m.gptx")
    assert found.config == config
    assert np.array_equal(found.weight("score.weight"), random_tensors(config)["score.weight"])
    rows = dict(modelfile.describe(found))
    assert rows["problem_type"] == SINGLE_LABEL
    assert "good" in rows["labels"]
    total = sum(math.prod(shape) for shape in modelfile.canonical_shapes(config).values())
    assert total == config.n_params


def test_a_config_without_labels_is_written_as_before():
    values = make_config(**TINY).to_dict()
    assert "labels" not in values
    assert "problem_type" not in values
    assert GPTConfig.from_dict(values) == make_config(**TINY)


@pytest.mark.parametrize("dtype", modelfile.DTYPES)
def test_every_flipped_bit_of_the_config_and_the_head_is_found(tmp_path, dtype):
    head_file(tmp_path / "m.gptx", dtype)
    data = bytearray((tmp_path / "m.gptx").read_bytes())
    config = data.index(b'"config":'), data.index(b'"dtype":')
    head = len(data) - 4 * 3 * 16, len(data)
    for begin, end in (config, head):
        for bit in range(8 * begin, 8 * end, 1 if dtype == "int8" else 7):
            data[bit // 8] ^= 1 << bit % 8
            with pytest.raises(ModelFileError) as caught:
                modelfile.read_buffer(bytes(data))
            data[bit // 8] ^= 1 << bit % 8
            if begin == head[0]:
                assert caught.value.field == "checksum of score.weight"


def test_a_damaged_label_is_named(tmp_path):
    head_file(tmp_path / "m.gptx")
    data = (tmp_path / "m.gptx").read_bytes()
    for old, new, field in [
        (b'\\"good\\"', b'\\"food\\"', "labels"),
        (b'\\"labels\\"', b'\\"mabels\\"', "labels"),
        (b'\\"problem_type\\":\\"s', b'\\"problem_tape\\":\\"s', "problem_type"),
        (b"single_label_", b"tingle_label_", "problem_type"),
    ]:
        assert data.count(old) in (1, 2)
        with pytest.raises(ModelFileError) as caught:
            modelfile.read_buffer(data.replace(old, new, 1))
        assert field in caught.value.field


def test_random_bursts_in_a_file_with_a_head_are_found(tmp_path):
    head_file(tmp_path / "m.gptx")
    data = (tmp_path / "m.gptx").read_bytes()
    rng = random.Random(1)
    for _ in range(1000):
        damaged = bytearray(data)
        begin = rng.randrange(len(data))
        damaged[begin : begin + rng.randint(1, 100)] = rng.randbytes(rng.randint(1, 100))
        if damaged != data:
            with pytest.raises(ModelFileError):
                modelfile.read_buffer(bytes(damaged))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"labels": ("a", "a"), "problem_type": SINGLE_LABEL}, "labels"),
        ({"labels": ("",), "problem_type": SINGLE_LABEL}, "labels"),
        ({"labels": ["a"], "problem_type": SINGLE_LABEL}, "labels"),
        ({"labels": ("\ud800",), "problem_type": SINGLE_LABEL}, "labels"),
        ({"labels": ("a",)}, "problem_type"),
        ({"problem_type": SINGLE_LABEL}, "problem_type"),
    ],
)
def test_a_config_names_what_is_wrong_with_its_head(changes, param):
    with pytest.raises(ParameterError) as caught:
        make_config(**TINY, **changes)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"labels": []}, "labels"),
        ({"labels": "ab"}, "labels"),
        ({"labels": ["a"]}, "problem_type"),
        ({"labels": ["a"], "problem_type": "ranking"}, "problem_type"),
    ],
)
def test_a_head_is_labels_and_a_problem_type_or_nothing(changes, param):
    with pytest.raises(ParameterError) as caught:
        GPTConfig.from_dict(make_config(**TINY).to_dict() | {"problem_type": ""} | changes)
    assert caught.value.param == param or changes == {"labels": ["a"]}


def test_labels_too_long_for_a_header_are_refused(tmp_path):
    with pytest.raises(ConvertError, match="labels: expected names"):
        head_file(tmp_path / "m.gptx", labels=("长" * 12_000,))
    assert not (tmp_path / "m.gptx").exists()


def test_training_goes_on_without_the_head(tmp_path):
    pytest.importorskip("tokenizers")
    from gptx.training.options import TrainOptions
    from gptx.training.start import from_checkpoint

    path = converted(tmp_path, twin(LABELS))
    start = from_checkpoint(TrainOptions(data=("x",), out=str(tmp_path / "o"), init=str(path)))
    assert start.config.labels == ()
    assert "score.weight" not in start.tensors
    assert any("classification head" in note for note in start.notes)
