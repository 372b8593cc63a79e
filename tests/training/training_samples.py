"""Texts and options for the tests of training."""

import random

WORDS = ["the", "king", "queen", "opened", "a", "door", "and", "wept", *"春风月光《》。"]


def make_text(n_documents, seed):
    rng = random.Random(seed)
    documents = [" ".join(rng.choices(WORDS, k=40)) for _ in range(n_documents)]
    return "\n<|endoftext|>\n".join(documents)


TINY = dict(
    n_layer=2,
    n_head=2,
    n_embd=32,
    block_size=32,
    vocab_size=300,
    batch_size=4,
    steps=12,
    warmup=3,
    lr=3e-3,
    eval_every=6,
    eval_rows=4,
    save_every=6,
    sample_every=100,
    threads=1,
)
