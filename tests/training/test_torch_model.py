import numpy as np
import pytest
import torch

from gptx.errors import ConvertError
from gptx.training.loss import linear_cross_entropy
from gptx.training.model import GPT
from models import make_config, random_tensors

IDS = torch.arange(40).reshape(2, 20) * 5 % 211


def make_model(config, dtype=torch.float32):
    model = GPT(config).to(dtype).eval()
    model.load_canonical(random_tensors(config))
    return model


def transformers_twin(config, dtype):
    transformers = pytest.importorskip("transformers")
    hf_config = transformers.GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.block_size,
        n_embd=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.n_inner,
        activation_function=config.activation,
        layer_norm_epsilon=config.layer_norm_epsilon,
        scale_attn_weights=config.scale_attn_weights,
        scale_attn_by_inverse_layer_idx=config.scale_attn_by_inverse_layer_idx,
        tie_word_embeddings=config.tie_word_embeddings,
        attn_implementation="eager",
    )
    twin = transformers.GPT2LMHeadModel(hf_config).to(dtype).eval()
    state = twin.state_dict()
    for name, array in random_tensors(config).items():
        key = name if name.startswith("lm_head") else f"transformer.{name}"
        is_conv1d = ".c_" in name and name.endswith("weight")
        state[key] = torch.from_numpy(array.T.copy() if is_conv1d else array)
    twin.load_state_dict(state, strict=not config.tie_word_embeddings)
    if config.tie_word_embeddings:
        twin.tie_weights()
    return twin


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"activation": "gelu"},
        {"activation": "relu", "n_inner": 56},
        {"scale_attn_weights": False},
        {"scale_attn_by_inverse_layer_idx": True, "layer_norm_epsilon": 1e-3},
        {"tie_word_embeddings": False, "n_head": 1},
        {"n_embd": 75, "n_head": 25, "vocab_size": 333},
    ],
    ids=str,
)
def test_logits_equal_those_of_transformers_in_double_precision(changes):
    config = make_config(**changes)
    model, twin = make_model(config, torch.float64), transformers_twin(config, torch.float64)
    with torch.no_grad():
        found, expected = model(IDS)[0], twin(IDS).logits
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_canonical_tensors_come_back_as_they_were_loaded():
    config = make_config(tie_word_embeddings=False)
    tensors = random_tensors(config)
    back = make_model(config).canonical_tensors()
    assert back.keys() == tensors.keys()
    for name, array in tensors.items():
        assert back[name].dtype == np.float32
        np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_a_tensor_at_fault_is_named_and_nothing_is_loaded():
    config = make_config()
    model = make_model(config)
    before = model.canonical_tensors()
    tensors = random_tensors(config, seed=9)
    missing = {k: v for k, v in tensors.items() if k != "h.1.ln_2.bias"}
    for wrong, name in (
        (missing, "h.1.ln_2.bias"),
        (tensors | {"h.2.ln_1.bias": tensors["ln_f.bias"]}, "h.2.ln_1.bias"),
        (tensors | {"wpe.weight": tensors["wpe.weight"][1:]}, "wpe.weight"),
    ):
        with pytest.raises(ConvertError, match=name.replace(".", r"\.")) as caught:
            model.load_canonical(wrong)
        assert caught.value.tensor == name
    for name, array in model.canonical_tensors().items():
        np.testing.assert_array_equal(array, before[name])


def test_a_token_does_not_see_what_follows():
    model = make_model(make_config())
    changed = IDS.clone()
    changed[:, 11:] = 3
    with torch.no_grad():
        first, second = model(IDS)[0], model(changed)[0]
    torch.testing.assert_close(first[:, :11], second[:, :11])
    assert not torch.equal(first[:, 11:], second[:, 11:])


def test_dropout_acts_in_training_only():
    model = GPT(make_config(), dropout=0.5)
    ids, targets = IDS[:, :-1], IDS[:, 1:]
    with torch.no_grad():
        assert model(ids, targets)[1] != model(ids, targets)[1]
        model.eval()
        assert model(ids, targets)[1] == model(ids, targets)[1]


@pytest.mark.parametrize("n_rows", [1, 700])
def test_the_fused_loss_has_the_value_and_gradients_of_cross_entropy(n_rows):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_rows, 24, dtype=torch.float64, generator=generator)
    weight = torch.randn(5000, 24, dtype=torch.float64, generator=generator)
    targets = torch.randint(5000, (n_rows,), generator=generator)
    results = []
    for loss_of in (
        linear_cross_entropy,
        lambda x, w, t: torch.nn.functional.cross_entropy(x @ w.T, t),
    ):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = loss_of(*leaves, targets)
        (3 * loss).backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(x, weight, targets), results[1][0])


def test_the_fused_loss_works_in_bfloat16_autocast():
    x = torch.randn(64, 32, requires_grad=True)
    weight = torch.randn(300, 32, requires_grad=True)
    targets = torch.arange(64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(x, weight, targets)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(x @ weight.T, targets)
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    assert x.grad.dtype == weight.grad.dtype == torch.float32
