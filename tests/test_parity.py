"""float32 logits against transformers and against float64, on random and on trained weights."""

import numpy as np
import pytest

from models import as_transformers, canonical_of, generate, make_config, make_engine, random_tensors

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

GPT2 = dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768)


def torch_logits(model, ids, dtype=torch.float32):
    with torch.inference_mode():
        return model.to(dtype)(torch.tensor(ids[None], dtype=torch.long)).logits[0].numpy()


def gpt2_initialised(config, seed=0):
    """Weights as GPT-2 initialises them: normal with 0.02, residual projections smaller."""
    tensors = random_tensors(config, seed, std=0.02)
    for name in tensors:
        if name.endswith("c_proj.weight"):
            tensors[name] /= np.float32(np.sqrt(2 * config.n_layer))
    return tensors


def assert_parity(engine, model, prompts):
    ours, theirs, exact = [], [], []
    for ids in prompts:
        ours.append(engine.logits(ids))
        theirs.append(torch_logits(model, ids))
    for ids in prompts:
        exact.append(torch_logits(model, ids, torch.float64))
    model.to(torch.float32)
    ours, theirs, exact = (np.concatenate(a).astype(float) for a in (ours, theirs, exact))
    assert np.abs(ours - theirs).max() <= 1e-4
    assert np.abs(ours - exact).max() <= 1.5 * np.abs(theirs - exact).max()
    assert rms(ours - exact) <= 1.5 * rms(theirs - exact)


def rms(x):
    return np.sqrt((x**2).mean())


def random_prompts(config, lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, config.vocab_size, n).astype(np.int32) for n in lengths]


def test_logits_of_the_gpt2_shape_equal_those_of_transformers():
    config = make_config(**GPT2)
    tensors = gpt2_initialised(config)
    model = as_transformers(config, tensors)
    assert_parity(make_engine(config, tensors), model, random_prompts(config, [1, 33, 200]))


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_head=1, n_embd=96),
        dict(n_head=25, n_embd=400),
        dict(n_head=2, n_embd=32),
        dict(n_head=2, n_embd=256),
        dict(n_inner=100),
        dict(vocab_size=509),
        dict(block_size=32),
        dict(block_size=2048),
        dict(activation="gelu"),
        dict(activation="relu"),
        dict(tie_word_embeddings=False),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True, n_layer=4),
    ],
    ids=str,
)
def test_logits_of_many_shapes_equal_those_of_transformers(changes):
    config = make_config(**changes)
    tensors = random_tensors(config)
    model = as_transformers(config, tensors)
    lengths = [1, 30, min(config.block_size, 700)]
    assert_parity(make_engine(config, tensors), model, random_prompts(config, lengths))


@pytest.fixture(scope="module")
def trained():
    """The built-in demo model: its float32 values in gptx and in transformers."""
    from gptx import modelfile
    from gptx.loading import demo_path

    source = modelfile.read(demo_path())
    tensors = canonical_of(source)
    return (
        source.config,
        make_engine(source.config, tensors),
        as_transformers(source.config, tensors),
    )


OPENINGS = ("Once upon a time", "The king said", "In the forest", "《春夜》", "话说")
ENGLISH = ("there lived", "a little", "he was", "the princess", "and so", "the old woman")
CHINESE = ("明月", "山中", "一日", "何处")
PROMPTS = [f"{opening} {rest}" for opening in OPENINGS for rest in ENGLISH + CHINESE]


def test_logits_of_the_trained_model_equal_those_of_transformers(trained):
    config, engine, model = trained
    assert_parity(engine, model, random_prompts(config, [1, 100, config.block_size]))


def test_greedy_text_of_the_trained_model_equals_that_of_transformers(trained):
    from transformers import GenerationConfig

    import gptx

    _, engine, model = trained
    tokenizer = gptx.load().tokenizer
    greedy = GenerationConfig(max_new_tokens=64, do_sample=False, pad_token_id=0)
    assert len(PROMPTS) == 50
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        inputs = torch.tensor([ids])
        output = model.generate(inputs, greedy, attention_mask=torch.ones_like(inputs))
        assert generate(engine, ids, 64) == output[0, len(ids) :].tolist(), prompt
