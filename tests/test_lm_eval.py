"""The adapter of the lm-evaluation-harness: the figures of the harness's own for transformers."""

import json
import os

import numpy as np
import pytest

from gptx import modelfile
from gptx.errors import ContextLengthError, ParameterError
from models import as_transformers, canonical_of, write_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
pytest.importorskip("torch")
pytest.importorskip("transformers")
lm_eval = pytest.importorskip(
    "lm_eval", reason='lm-eval is not installed: pip install "gptx[eval]"'
)

TEXTS = [
    "Once upon a time there was a king who had three sons, and the youngest was called Dummling.",
    "The old woman gave him a goose with feathers of pure gold, and he took it to an inn.",
    "«Что это?» 床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "x",
    "In the wood lived a wolf. " * 30,
]
QUESTIONS = [
    ("Who had three sons?", ["the king", "a wolf", "the old woman and her goose"], 0),
    ("Where did he take the goose?", ["to the wood", "to an inn"], 1),
    ("What was it made of?", ["gold", "wood", "iron", "glass"], 0),
    ("A long story. " * 40 + "What was that?", ["a story", "a question"], 0),
    ("  Trailing spaces?   ", ["yes", "no"], 1),
]

TASKS = {
    "gptx_choice": """
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - metric: acc
  - metric: acc_norm
""",
    "gptx_words": """
output_type: loglikelihood
test_split: test
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' ' + text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
    aggregation: perplexity
    higher_is_better: false
  - metric: acc
""",
    "gptx_rolling": """
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
""",
    "gptx_until": """
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs:
  until: ["\\n", "."]
  do_sample: false
  max_gen_toks: 20
metric_list:
  - metric: exact_match
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random GPT-2 with a BPE of its own, as transformers writes it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("hf") / "gpt2"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=end, eos_token=end, unk_token=end
    )
    config = write_model(
        folder.parent / "m.gptx", vocab_size=bpe.get_vocab_size(), block_size=96, n_embd=48
    )
    tensors = canonical_of(modelfile.read(folder.parent / "m.gptx"))
    tensors["wte.weight"] *= 4  # so that answers differ in probability
    twin = as_transformers(config, tensors)
    twin.config.bos_token_id = twin.config.eos_token_id = 0
    twin.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks, each a yaml with a jsonl."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": c, "label": a} for q, c, a in QUESTIONS]
    texts = [{"text": text} for text in TEXTS]
    for name, text in TASKS.items():
        data = folder / f"{name}.jsonl"
        docs = rows if name == "gptx_choice" else texts[:3] if name == "gptx_words" else texts
        data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
        (folder / f"{name}.yaml").write_text(
            f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {data}\n"
            f"  cache_dir: {folder / 'cache'}\n{text.strip()}\nmetadata:\n  version: 1.0\n"
        )
    return folder


def evaluate(model, folder, names=tuple(TASKS), **options):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return lm_eval.simple_evaluate(
        model=model,
        tasks=list(names),
        task_manager=manager,
        bootstrap_iters=0,
        **options,
    )


@pytest.fixture(scope="module")
def ours(folder):
    from gptx.integrations.lm_eval import GptxLM

    return GptxLM(folder)


@pytest.fixture(scope="module")
def theirs(folder):
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=3)


def responses(results):
    return {
        name: [sample["resps"] for sample in sorted(samples, key=lambda s: s["doc_id"])]
        for name, samples in results["samples"].items()
    }


@pytest.mark.parametrize("num_fewshot", [0, 2])
def test_every_kind_of_task_has_the_figures_of_transformers(ours, theirs, tasks, num_fewshot):
    names = [name for name in TASKS if num_fewshot == 0 or name == "gptx_choice"]
    found, expected = (
        evaluate(model, tasks, names, num_fewshot=num_fewshot or None) for model in (ours, theirs)
    )
    for name in names:
        figures = expected["results"][name]
        assert set(found["results"][name]) == set(figures)
        for metric, value in figures.items():
            if isinstance(value, float):
                assert np.isclose(found["results"][name][metric], value, rtol=1e-4), metric
    texts, others = responses(found), responses(expected)
    for name in names:
        assert len(texts[name]) == len(others[name])
        for mine, other in zip(texts[name], others[name], strict=True):
            if name == "gptx_until":
                assert mine == other
                continue
            for a, b in zip(np.ravel(mine), np.ravel(other), strict=True):
                assert np.isclose(float(a), float(b), atol=1e-4, rtol=1e-5)


def instances(*arguments):
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type="loglikelihood", doc={}, arguments=a, idx=i, metadata=("t", i, 1))
        for i, a in enumerate(arguments)
    ]


def test_requests_with_the_same_context_compute_it_once(ours):
    context = TEXTS[0]
    n = len(ours.tok_encode(context))
    before = ours.model._engine.stats()["rows"]
    pairs = [(context, f" {word}") for word in ("a", "b", "c", "d")]
    together = ours.loglikelihood(instances(*pairs), disable_tqdm=True)
    rows = ours.model._engine.stats()["rows"] - before
    assert rows < n + 4 * 4
    for pair, answer in zip(pairs, together, strict=True):
        assert ours.loglikelihood(instances(pair), disable_tqdm=True) == [answer]


def test_a_context_too_long_is_cut_from_the_left(ours):
    ids = ours.tok_encode("In the wood lived a wolf. " * 30)
    assert len(ids) > 2 * ours.max_length
    rest = ids[:5]
    answers = ours._loglikelihood_tokens([(None, ids, rest)], disable_tqdm=True)
    whole = [*ids[-(ours.max_length + 1 - len(rest)) :], *rest]
    expected = ours.model.logprobs(whole).logprobs[-len(rest) :]
    assert np.isclose(answers[0][0], expected.sum(), atol=1e-4)
    settings = {"until": [], "max_gen_toks": 10}
    text = ours.generate_until(instances(("wolf " * 300, settings)), disable_tqdm=True)[0]
    cut = ours.tok_encode("wolf " * 300)[-(ours.max_length - 10) :]
    expected = ours.model.generate(cut, temperature=0, max_new_tokens=10, stop="<|endoftext|>")
    assert text == expected.text


def test_a_request_that_cannot_be_answered_is_refused(ours):
    with pytest.raises(ContextLengthError):
        ours._loglikelihood_tokens([(None, [1], [2] * 97)], disable_tqdm=True)
    for settings, name in [
        ({"until": [], "max_gen_toks": 96}, "max_gen_toks"),
        ({"until": [], "beam_width": 3}, "beam_width"),
        ({"until": [], "do_sample": True, "temperature": -1}, "temperature"),
    ]:
        with pytest.raises(ParameterError) as caught:
            ours.generate_until(instances(("Once", settings)), disable_tqdm=True)
        assert caught.value.param == name


def test_tasks_that_sample_are_the_same_again(ours):
    settings = {"until": ["\n"], "do_sample": True, "temperature": 0.9, "max_gen_toks": 12}
    request = instances(("Once upon", settings), ("Once upon", settings | {"top_k": 1}))
    texts = ours.generate_until(request, disable_tqdm=True)
    assert texts == ours.generate_until(request, disable_tqdm=True)
    assert (
        texts[1]
        == ours.generate_until(
            instances(("Once upon", {"until": ["\n"], "max_gen_toks": 12})), disable_tqdm=True
        )[0]
    )


def test_the_harness_makes_the_model_from_a_string(folder, ours):
    from lm_eval.api.registry import get_model

    lm = get_model("gptx").create_from_arg_string(
        f"model={folder},threads=1,max_length=64", {"batch_size": 8, "device": None}
    )
    assert (lm.max_length, lm.model.threads, lm.max_gen_toks) == (64, 1, 32)
    assert lm.eot_token_id == lm.prefix_token_id == ours.eot_token_id
    for options, name in [
        ({"max_length": 97}, "max_length"),
        ({"max_gen_toks": 0}, "max_gen_toks"),
    ]:
        with pytest.raises(ParameterError) as caught:
            type(lm)(ours.model, **options)
        assert caught.value.param == name
    with pytest.raises(ParameterError, match="threads"):
        type(lm)(ours.model, threads=2)


def test_the_command_gives_the_figures_as_a_table_or_as_json(folder, tasks, ours):
    from test_cli import gptx_command

    wanted = ("eval", "-m", folder, "--tasks", "gptx_choice,gptx_rolling", "--include-path", tasks)
    found = gptx_command(*wanted, "--limit", 3, "--json")
    assert found.returncode == 0, found.stderr
    figures = json.loads(found.stdout)["results"]
    expected = evaluate(ours, tasks, ["gptx_choice", "gptx_rolling"], limit=3)["results"]
    for name, metric in [("gptx_choice", "acc,none"), ("gptx_rolling", "bits_per_byte,none")]:
        assert np.isclose(figures[name][metric], expected[name][metric], rtol=1e-6)
    table = gptx_command(*wanted, "--limit", 3)
    assert "|gptx_choice" in table.stdout


def test_a_task_that_does_not_exist_is_refused_by_name(ours, tasks, monkeypatch):
    from lm_eval import tasks as harness

    from gptx.evaluation import evaluate_tasks

    whole = harness.TaskManager
    monkeypatch.setattr(
        harness, "TaskManager", lambda **options: whole(**options | {"include_defaults": False})
    )
    with pytest.raises(ParameterError, match="no_such_task"):
        evaluate_tasks(
            ours.model, ["gptx_choice", "no_such_task"], include_path=str(tasks), limit=1
        )
