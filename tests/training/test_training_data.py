import gzip
import hashlib
import lzma

import numpy as np
import pytest

from gptx.errors import ParameterError
from gptx.training.data import (
    Batches,
    TokenSet,
    is_held_out,
    read_documents,
    split_documents,
    tokenize_file,
)


def encode_batch(texts):
    return [[ord(c) for c in text] for text in texts]


def make_set(n, first=0, name="file"):
    tokens = np.arange(first, first + n, dtype=np.uint16)
    return TokenSet(name, tokens, tokens[:0], 0)


def test_documents_end_at_lines_that_hold_only_the_end_of_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(
        "\ufeffone\n<|endoftext|>\n\n two\nlines <|endoftext|>\n<|endoftext|>\n", "utf-8"
    )
    assert read_documents(path) == ["one", "two\nlines <|endoftext|>"]


def test_compressed_files_read_as_plain_ones(tmp_path):
    text = "春\n<|endoftext|>\nspring"
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(text.encode()))
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(text.encode()))
    for path in tmp_path.iterdir():
        assert read_documents(path) == ["春", "spring"]


@pytest.mark.parametrize(
    ("name", "content", "allowed"),
    [
        ("a.txt", b"\xff\xfe", "UTF-8"),
        ("a.xz", b"no archive", "intact"),
        ("a.gz", b"no archive", "intact"),
        ("b.gz", gzip.compress(b"text" * 99)[:-9], "intact"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, name, content, allowed):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ParameterError, match=allowed) as caught:
        read_documents(tmp_path / name)
    assert name in str(caught.value)


def test_one_document_in_a_hundred_is_held_out_by_its_hash():
    documents = [f"document {i}" for i in range(20_000)]
    held_out = [d for d in documents if is_held_out(d)]
    assert 150 < len(held_out) < 250
    for document in held_out:
        assert int(hashlib.sha256(document.encode()).hexdigest(), 16) % 100 == 0
    train, val = split_documents(documents)
    assert val == held_out
    assert sorted(train + val) == sorted(documents)


def test_one_long_text_holds_out_its_end():
    text = "".join(map(str, range(1000)))
    train, val = split_documents([text])
    assert train[0] + val[0] == text
    assert len(val[0]) == len(text) // 20


def test_held_out_text_is_in_no_training_row():
    documents = [f"{i:05}" for i in range(3000)]
    token_set = tokenize_file("f", documents, encode_batch, start_ids=[0], n_vocab=128)
    held_out = [d for d in documents if is_held_out(d)]
    assert held_out
    batches = Batches([token_set], [1.0], block_size=64, seed=3)
    seen = " ".join("".join(map(chr, row)) for row in batches.rows(0, 600)[0])
    assert all(f"\0{document}" not in seen for document in held_out)
    assert sum(f"\0{document}" in seen for document in split_documents(documents)[0]) > 2000
    assert "".join(map(chr, token_set.val)) == "".join(f"\0{d}" for d in held_out)
    assert token_set.val_characters == 5 * len(held_out)


@pytest.mark.parametrize(("n_vocab", "dtype"), [(65_536, np.uint16), (65_537, np.uint32)])
def test_ids_take_no_more_bytes_than_the_vocabulary_needs(n_vocab, dtype):
    token_set = tokenize_file("f", ["ab"], encode_batch, start_ids=[], n_vocab=n_vocab)
    assert token_set.train.dtype == token_set.val.dtype == dtype


def test_targets_are_the_inputs_one_token_later():
    inputs, targets = Batches([make_set(5000)], [1.0], block_size=8, seed=0).rows(7, 5)
    assert inputs.shape == targets.shape == (5, 8)
    assert inputs.dtype == targets.dtype == np.int64
    np.testing.assert_array_equal(inputs + 1, targets)


def test_rows_are_the_same_in_any_order_and_grouping():
    def make():
        return Batches([make_set(900), make_set(400, 2000)], [2, 1], block_size=8, seed=5)

    together = make().rows(0, 3000)[0]
    late = make()
    np.testing.assert_array_equal(late.rows(2990, 10)[0], together[2990:])
    np.testing.assert_array_equal(late.rows(0, 10)[0], together[:10])


def test_an_epoch_holds_every_window_once():
    batches = Batches([make_set(805)], [1.0], block_size=8, seed=1)
    starts = batches.rows(0, 99)[0][:, 0]
    assert len(set(starts)) == 99
    assert len(set(starts % 8)) == 1
    assert not np.array_equal(starts, batches.rows(99, 99)[0][:, 0])


@pytest.mark.parametrize("mix", [[0.38, 0.45, 0.17], [1e-6, 1, 1], [1, 1, 1]])
def test_files_are_mixed_by_their_weights(mix):
    sets = [make_set(1000, 1000 * i) for i in range(3)]
    rows = Batches(sets, mix, block_size=8, seed=0).rows(0, 1000)[0]
    counts = np.bincount(rows[:, 0] // 1000, minlength=3)
    np.testing.assert_allclose(counts / 1000, np.array(mix) / sum(mix), atol=2e-3)
    assert counts.min() >= 1


def test_another_seed_gives_other_rows():
    rows = [Batches([make_set(900)], [1.0], 8, seed).rows(0, 50)[0] for seed in (1, 2)]
    assert not np.array_equal(*rows)


def test_a_file_with_too_little_text_is_named():
    with pytest.raises(ParameterError, match=r"more than 32 tokens .* in short\.txt"):
        Batches([make_set(900), make_set(32, name="short.txt")], [1, 1], block_size=16, seed=0)
