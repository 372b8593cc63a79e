"""Small random models with a byte-level tokenizer, saved by transformers."""

from __future__ import annotations

import json
import warnings
from functools import cached_property

from gptx import hf
from models import as_transformers, make_config, random_tensors

TEXT = (
    """Once upon a time there was a princess who lived in a tall tower by the sea, and every
morning she opened the window and sang to the birds. One day a prince came by and heard her song.
"Who sings there?" he asked; but nobody answered. 你好，世界！ It's 1,234 o'clock -- don't wait.
"""
    * 4
)
PROMPTS = [
    "Once upon a time",
    "The princess",
    "a",
    "One day the prince asked",
    "你好",
    "song song song song",
    " the birds and the sea and the birds and",
    "It's 12",
    "window",
    "tower by the sea. Once upon",
    "she sang:",
    "\n\n",
    "nobody answered nobody",
    "tall tall tower tower tall",
    "x y z",
    "don't",
    "every morning she opened",
    "W",
    "世界",
    "came by and heard her song",
]
SHAPES = {
    "tied": dict(std=0.3),
    "untied": dict(tie_word_embeddings=False, activation="gelu", std=0.25),
    "wide": dict(n_embd=64, n_head=4, n_layer=3, scale_attn_by_inverse_layer_idx=True, std=0.2),
}
END = "<|endoftext|>"


def save_tokenizer(folder, vocab_size=400):
    """A byte-level BPE that transformers' GPT2Tokenizer saves; returns the size it has."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import GPT2Tokenizer

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator([TEXT], trainer)
    trained.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    lines = (folder / "merges.txt").read_text().splitlines()
    merges = [tuple(line.split(" ")) for line in lines if not line.startswith("#version")]
    for name in ("vocab.json", "merges.txt"):
        (folder / name).unlink()
    tokenizer = GPT2Tokenizer(vocab=vocab, merges=merges)
    tokenizer.model_max_length = 96
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def save_folder(folder, kind, **changes):
    """A model and its tokenizer; the end token is likely enough to come now and then."""
    from transformers import AutoTokenizer

    folder.mkdir()
    size = save_tokenizer(folder)
    shape = dict(SHAPES[kind]) | changes
    std = shape.pop("std")
    config = make_config(vocab_size=size, **shape)
    tensors = random_tensors(config, seed=len(kind), std=std)
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    for name in ("wte.weight", "lm_head.weight"):
        if name in tensors:
            tensors[name][end] *= 2.5
    model = as_transformers(config, tensors)
    for target in (model.config, model.generation_config):
        target.eos_token_id = target.bos_token_id = end
    model.save_pretrained(folder)


class Pair:
    """A folder opened by both libraries. `run` calls a function with each."""

    def __init__(self, folder):
        self.folder = folder

    @cached_property
    def ours(self):
        return Opened(hf, self.folder)

    @cached_property
    def theirs(self):
        import transformers

        transformers.logging.set_verbosity_error()
        return Opened(transformers, self.folder)

    def run(self, script):
        """What a script gives with gptx.hf, and with transformers."""
        return script(self.ours), quietly(script, self.theirs)


class Opened:
    """A library with the model and the tokenizer of a folder."""

    def __init__(self, library, folder):
        self.library = library
        self.folder = folder
        self.tokenizer = library.AutoTokenizer.from_pretrained(folder)
        self.end = self.tokenizer.eos_token_id

    @cached_property
    def model(self):
        return self.library.AutoModelForCausalLM.from_pretrained(self.folder)

    def padded(self, texts, side="left"):
        self.tokenizer.pad_token = self.tokenizer.eos_token
        self.tokenizer.padding_side = side
        return self.tokenizer(texts, return_tensors="pt", padding=True)

    def generate(self, texts, **arguments):
        """The ids of a padded batch as lists."""
        return self.model.generate(**self.padded(texts), **arguments).tolist()


def quietly(function, *arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments)
