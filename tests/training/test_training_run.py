"""Whole runs of tiny models."""

import contextlib
import io
import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from training_samples import make_text

import gptx
from gptx.checkpoints import read_checkpoint
from gptx.errors import ConvertError, ParameterError, TokenizeError, TrainingError
from gptx.training import run, trainer
from gptx.training.data import read_documents
from gptx.training.model import GPT
from gptx.training.progress import Progress
from gptx.training.state import load_state


def train(options):
    """Exit code and what was shown."""
    stream = io.StringIO()
    return run.train(options, Progress(stream)), stream.getvalue()


def resume(options, **changes):
    stream = io.StringIO()
    return run.resume(options.out, changes, Progress(stream)), stream.getvalue()


@contextlib.contextmanager
def interrupted_after(monkeypatch, n_steps, number=signal.SIGINT):
    """Sends a signal during the step of that number."""
    step = trainer.Trainer._step

    def step_with_signal(self):
        if self.position.step == n_steps - 1:
            os.kill(os.getpid(), number)
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", step_with_signal)
        yield


@pytest.fixture
def folder_of(tiny_options):
    """Trains once and gives the folder."""

    def make(**changes):
        options = tiny_options(**changes)
        assert train(options)[0] == 0
        return options.out

    return make


def read(path):
    return path.read_text(encoding="utf-8")


def weights(path):
    return {name: np.array(a) for name, a in read_checkpoint(path).tensors.items()}


def assert_same_state(first, second):
    first, second = load_state(first), load_state(second)
    assert first.step == second.step
    assert (first.best_loss, first.best_step) == (second.best_loss, second.best_step)
    for name, tensor in first.model.items():
        assert torch.equal(tensor, second.model[name]), name
    for one, other in zip(first.optimizers, second.optimizers, strict=True):
        assert one["param_groups"] == other["param_groups"]
        for i, values in one["state"].items():
            for key, value in values.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other["state"][i][key]))


def test_a_run_lowers_the_loss_and_leaves_a_model(tiny_options, tmp_path):
    options = tiny_options(steps=40, eval_every=20, sample_every=40, warmup=5)
    code, shown = train(options)
    assert code == 0
    log = [json.loads(line) for line in read(tmp_path / "out" / "log.jsonl").splitlines()]
    assert [record["step"] for record in log] == [20, 40]
    assert log[1]["val_loss"] < log[0]["val_loss"] < np.log(300)
    assert log[1]["val_loss"] < 3.6
    assert "sample at step 40" in shown
    summary = json.loads(read(tmp_path / "out" / "training.json"))
    assert [file["name"] for file in summary["files"]] == ["tales.txt", "poems.txt"]
    for file in summary["files"]:
        assert file["perplexity"] == pytest.approx(np.exp(file["loss"]))
        assert file["nats_per_character"] > 0
    assert not {"data", "out"} & summary["options"].keys()
    model = gptx.load(f"{options.out}/model.gptx")
    assert model.generate("the king", max_new_tokens=5, seed=1).text


@pytest.mark.parametrize(
    "changes",
    [
        {"dropout": 0.2, "grad_accum": 2},
        {"precision": "bfloat16"},
        {"optimizer": "muon", "precision": "float32"},
    ],
    ids=str,
)
def test_an_interrupted_run_resumes_bit_for_bit(tiny_options, tmp_path, monkeypatch, changes):
    whole = tiny_options(out=str(tmp_path / "whole"), **changes)
    parted = tiny_options(out=str(tmp_path / "parted"), **changes)
    assert train(whole)[0] == 0
    with interrupted_after(monkeypatch, 5):
        code, shown = train(parted)
    assert code == 130
    assert "--resume" in shown
    assert load_state(tmp_path / "parted").step == 5
    with interrupted_after(monkeypatch, 8, signal.SIGTERM):
        assert resume(parted)[0] == 143
    assert resume(parted)[0] == 0
    assert_same_state(tmp_path / "whole", tmp_path / "parted")
    for name in ("model.safetensors", "model.gptx", "tokenizer.json", "config.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parted" / name).read_bytes()


def test_a_run_goes_on_from_its_last_checkpoint_after_a_crash(tiny_options, tmp_path, monkeypatch):
    whole, killed = (tiny_options(out=str(tmp_path / name)) for name in ("whole", "killed"))
    assert train(whole)[0] == 0
    step = trainer.Trainer._step

    def fail(self):
        if self.position.step == 9:
            raise MemoryError
        return step(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "_step", fail)
        with pytest.raises(MemoryError):
            train(killed)
    assert load_state(tmp_path / "killed").step == 6
    assert resume(killed)[0] == 0
    assert_same_state(tmp_path / "whole", tmp_path / "killed")


def test_a_run_that_fails_before_its_first_checkpoint_resumes(tiny_options, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "run", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tiny_options())
    assert load_state(tmp_path / "out").step == 0
    assert resume(tiny_options())[0] == 0


def test_samples_and_evaluations_do_not_change_the_run(tiny_options, tmp_path):
    plain = tiny_options(out=str(tmp_path / "plain"), eval_every=12)
    busy = tiny_options(out=str(tmp_path / "busy"), eval_every=1, sample_every=2)
    assert train(plain)[0] == train(busy)[0] == 0
    first, second = load_state(tmp_path / "plain"), load_state(tmp_path / "busy")
    for name, tensor in first.model.items():
        assert torch.equal(tensor, second.model[name]), name


def test_transformers_loads_the_folder_unchanged(folder_of, corpus):
    transformers = pytest.importorskip("transformers")
    folder = folder_of()
    model, report = transformers.GPT2LMHeadModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = read_documents(corpus[0])[0] + " 春风，don't!\n"
    ids = tokenizer(text)["input_ids"]
    ours = gptx.load(f"{folder}/model.gptx")
    assert ids == ours.tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == model.config.eos_token_id == 0
    checkpoint = read_checkpoint(folder)
    reference = GPT(checkpoint.config).eval()
    reference.load_canonical(checkpoint.tensors)
    window = torch.tensor([ids[:32]])
    with torch.no_grad():
        expected = model.eval()(window).logits
        torch.testing.assert_close(reference(window)[0], expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours.logits(ids[:32]), expected[0].numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("file", ["", "/model.gptx"])
def test_a_checkpoint_is_fine_tuned_with_its_tokenizer(folder_of, tiny_options, tmp_path, file):
    first = folder_of(steps=30)
    second = tiny_options(
        out=str(tmp_path / "tuned"), init=first + file, steps=2, lr=1e-9, block_size=16,
        n_layer=None, n_head=None, n_embd=None, vocab_size=None,
    )  # fmt: skip
    code, shown = train(second)
    assert code == 0
    assert "before the first step" in shown
    before, after = weights(first), weights(second.out)
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_allclose(after[name], array, rtol=0, atol=1e-6, err_msg=name)
    assert read_checkpoint(second.out).config.block_size == 32
    text = make_text(2, seed=5)
    tokenizers = [gptx.load(f"{f}/model.gptx").tokenizer for f in (first, second.out)]
    assert tokenizers[0].encode(text) == tokenizers[1].encode(text)


def test_a_model_of_characters_is_fine_tuned_and_converted(tmp_path, tiny_options, corpus):
    text = "".join(path.read_text(encoding="utf-8") for path in corpus)
    stoi = {c: i for i, c in enumerate(sorted(set(text)))}
    shape = dict(n_layer=1, n_head=1, n_embd=16, block_size=32)
    (tmp_path / "old").mkdir()
    config = gptx.config.GPTConfig(vocab_size=len(stoi), n_inner=64, **shape)
    torch.save(
        {
            "model": nanogpt_state(GPT(config)),
            "model_args": shape | {"vocab_size": len(stoi), "bias": True, "dropout": 0.0},
            "config": {"dataset": "chars"},
        },
        tmp_path / "old" / "ckpt.pt",
    )
    itos = {i: c for c, i in stoi.items()}
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": itos}
    (tmp_path / "old" / "meta.pkl").write_bytes(pickle.dumps(meta))
    options = tiny_options(
        init=str(tmp_path / "old" / "ckpt.pt"), steps=2, vocab_size=None, **dict.fromkeys(shape)
    )
    assert train(options)[0] == 0
    model = gptx.load(f"{options.out}/model.gptx")
    assert model.tokenizer.encode("the king") == [stoi[c] for c in "the king"]


def nanogpt_state(model):
    state = {f"transformer.{name}": p.data for name, p in model.named_parameters()}
    return state | {"lm_head.weight": model.wte.weight.data}


def test_the_mixture_defaults_to_the_tokens_of_the_files(tiny_options, tmp_path):
    assert train(tiny_options(steps=1))[0] == 0
    assert load_state(tmp_path / "out").mix == pytest.approx([4 / 7, 3 / 7], abs=0.03)


def test_the_clock_may_end_a_run(tiny_options):
    options = tiny_options(steps=None, minutes=0.02, eval_every=1000)
    code, shown = train(options)
    assert code == 0
    assert "best model" in shown


def test_text_without_held_out_documents_trains_too(tiny_options, tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("the king and the queen " * 200, encoding="utf-8")
    code, shown = train(tiny_options(data=(str(path),), steps=2))
    assert code == 0
    assert "held out" in shown


def test_a_loss_that_is_not_finite_stops_the_run(tiny_options):
    with pytest.raises(TrainingError, match="lower lr"):
        train(tiny_options(lr=1e30, grad_clip=1e30, warmup=0, precision="float32"))


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"n_embd": 33}, "n_head"),
        ({"vocab_size": 100}, "vocab_size"),
        ({"pattern": "["}, "pattern"),
        ({"block_size": 2**20}, "data"),
        ({"mix": (1.0,)}, "mix"),
        ({"mix": (1.0, -1.0)}, "mix"),
        ({"mix": (1.0, float("nan"))}, "mix"),
        ({"steps": 0}, "steps"),
        ({"batch_size": True}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"lr": 0.0}, "lr"),
        ({"lr": float("inf")}, "lr"),
        ({"min_lr": 1.0}, "min_lr"),
        ({"dropout": 1.0}, "dropout"),
        ({"optimizer": "sgd"}, "optimizer"),
        ({"precision": "float16"}, "precision"),
        ({"data": ()}, "data"),
    ],
    ids=str,
)
def test_an_option_that_is_not_possible_is_named(tiny_options, changes, param):
    with pytest.raises(ParameterError) as caught:
        train(tiny_options(**changes))
    assert caught.value.param == param


def test_a_missing_file_is_named_and_no_folder_is_made(tiny_options, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.txt"):
        train(tiny_options(data=(str(tmp_path / "no.txt"),)))
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_not_overwritten(tiny_options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("mine")
    with pytest.raises(ParameterError, match="new or empty"):
        train(tiny_options())
    assert (tmp_path / "out" / "config.json").read_text() == "mine"


@pytest.mark.parametrize("changes", [{"block_size": 64}, {"n_layer": 3}, {"pattern": "gpt2"}])
def test_options_that_contradict_the_checkpoint_are_refused(
    folder_of, tiny_options, tmp_path, changes
):
    shape = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    options = tiny_options(out=str(tmp_path / "b"), init=folder_of(steps=1), **(shape | changes))
    with pytest.raises(ParameterError) as caught:
        train(options)
    assert caught.value.param == next(iter(changes))


def test_a_checkpoint_without_tokenizer_is_refused(folder_of, tiny_options, tmp_path):
    folder = folder_of(steps=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "out" / name).unlink()
    with pytest.raises(TokenizeError, match="no tokenizer"):
        train(tiny_options(out=str(tmp_path / "b"), init=folder))


def test_resume_refuses_another_run(folder_of, tiny_options, tmp_path, corpus):
    options = tiny_options()
    with pytest.raises(ParameterError, match="checkpoint.pt"):
        resume(options)
    folder_of(steps=6)
    with pytest.raises(ParameterError, match="batch_size"):
        resume(options, batch_size=8)
    corpus[0].write_text(make_text(400, seed=77), encoding="utf-8")
    with pytest.raises(ParameterError, match="texts of the run"):
        resume(options)
    (tmp_path / "out" / "checkpoint.pt").write_bytes(b"PK damaged")
    with pytest.raises(ConvertError, match=r"checkpoint\.pt"):
        resume(options)


def test_a_finished_run_can_be_prolonged(folder_of, tiny_options, tmp_path):
    folder_of(steps=6)
    assert resume(tiny_options(), steps=9)[0] == 0
    assert load_state(tmp_path / "out").step == 9
