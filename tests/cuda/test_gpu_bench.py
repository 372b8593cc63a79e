"""The parts of bench/gpu.py on a tiny model: gptx on the emulator, torch on the CPU."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import gpu
import workloads
from gptx.modelfile import canonical_shapes
from gpu_bench import build, checking, driving, peers, processes, table, weights
from gpu_bench.driving import DecodeCase, Sample
from gpu_bench.roofline import Cost, Roof
from gpu_bench.torch_gpt import Gpt
from models import as_transformers, make_config, random_tensors

GPT2 = workloads.config_named("gpt2")
SCRIPT = Path(gpu.__file__)


@pytest.fixture(scope="module")
def config():
    return make_config(n_embd=48, n_head=3)


@pytest.fixture(scope="module")
def tensors(config):
    return random_tensors(config)


@pytest.fixture(scope="module")
def engine(config, tensors, emulated_library):
    packed = weights.pack(config, "bfloat16", tensors)
    return driving.open_engine(config, "bfloat16", packed, emulated_library, sequences=8)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """More than one costs more than it gives on models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- weights ------------------------------------------------------------------------------------


def test_pooled_weights_have_the_shapes_and_the_spread_of_gpt2(config):
    tensors = weights.PooledTensors(config)
    assert {name: value.shape for name, value in tensors.items()} == canonical_shapes(config)
    assert tensors["wte.weight"].std() == pytest.approx(0.02, rel=0.05)
    assert tensors["h.0.ln_1.weight"].mean() == pytest.approx(1, abs=0.02)
    again = weights.PooledTensors(config)["h.1.mlp.c_fc.weight"]
    assert np.array_equal(again, tensors["h.1.mlp.c_fc.weight"])
    assert not np.array_equal(again, tensors["h.0.mlp.c_fc.weight"])


def test_a_tensor_larger_than_the_pool_repeats_no_row():
    rows = weights.PooledTensors(make_config(vocab_size=40_000, n_embd=64))["wte.weight"]
    assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_weights_come_back_from_the_disk_as_they_were_packed(dtype, tmp_path):
    config = weights.config_named("tiny")
    path = weights.prepare(tmp_path, "tiny", dtype)
    written = path.stat().st_mtime_ns
    packed = weights.pack(config, dtype, weights.PooledTensors(config))
    found = weights.load(tmp_path, "tiny", dtype)
    assert [*found] == [*packed]
    assert all(np.array_equal(found[name], packed[name]) for name in packed)
    assert weights.prepare(tmp_path, "tiny", dtype).stat().st_mtime_ns == written


def test_gpt2_xl_has_its_parameters():
    assert weights.config_named("gpt2-xl").n_params == 1_557_611_200


# ---- torch --------------------------------------------------------------------------------------


def test_the_reference_is_the_model_of_transformers(config, tensors):
    ids = driving.random_prompts(config, [70])[0]
    with torch.no_grad():
        exact = as_transformers(config, tensors)(torch.from_numpy(ids).long()[None]).logits[0]
    torch.testing.assert_close(Gpt(config, tensors, "cpu").logits(ids), exact)


@pytest.mark.parametrize("attention", ["fused", "math"])
def test_a_decoder_with_a_static_cache_gives_the_choices_of_the_whole(config, tensors, attention):
    gpt = Gpt(config, tensors, "cpu")
    prompts = np.stack(driving.random_prompts(config, [40] * 3))
    decoder = peers.Decoder(gpt, 3, 40 + 17, peers.Peer(), attention)
    with torch.no_grad():
        for _ in range(2):  # again from the beginning, on the same buffers
            decoder.prefill(torch.from_numpy(prompts).long())
            for _ in range(16):
                decoder.step()
    for prompt, tokens in zip(prompts, decoder.tokens(40, 17), strict=True):
        sequence = np.concatenate([prompt, np.asarray(tokens, np.int32)])
        assert tokens == gpt.logits(sequence)[39:-1].argmax(dim=1).tolist()


def test_every_block_is_one_compiled_function(config, tensors):
    compiled = []

    def backend(module, _inputs):
        compiled.append(module)
        return module.forward

    gpt = Gpt(config, tensors, "cpu", torch.bfloat16, int8=True)
    block = torch.compile(peers.Block.forward, backend=backend, dynamic=False, fullgraph=True)
    caches = gpt.make_cache(2, 32)
    position, mask = torch.tensor([5]), torch.ones(1, 1, 1, 32, dtype=torch.bool)
    with torch.no_grad():
        x, h = gpt.embed(torch.tensor([[1], [2]]), position)
        for module, cache in zip(gpt.blocks, caches, strict=True):
            x, h = block(module, x, h, cache, position, mask)
    torch.compiler.reset()
    assert len(gpt.blocks) == 2
    assert len(compiled) == 1


@pytest.mark.parametrize(("name", "precision"), [("eager", "bfloat16"), ("eager", "int8")])
def test_a_peer_is_checked_and_timed(config, tensors, name, precision, monkeypatch):
    monkeypatch.setitem(peers.PEERS, name, peers.Peer(precision))
    cases = [DecodeCase(batch=2, prompt=20, steps=16)]
    decode, prefill = peers.measure(config, tensors, name, cases, 50, "cpu")
    assert decode["loss"] <= peers.LARGEST_LOSS
    assert [sample.tokens for sample in decode["samples"]] == [16] * 4
    assert [sample.tokens for sample in prefill["samples"]] == [50] * 10


def test_tokens_of_another_model_are_a_loss(config, tensors):
    prompt = driving.random_prompts(config, [20])[0]
    reference = Gpt(config, tensors, "cpu")
    tokens = driving.random_prompts(config, [16], seed=3)[0].tolist()
    assert peers.loss(prompt, tokens, reference) > 4 * peers.LARGEST_LOSS


# ---- driving the engine -------------------------------------------------------------------------


def test_sequences_wait_for_each_other_and_then_decode_together(config, engine):
    prompts = driving.random_prompts(config, [75, 3, 64, 65, 30])
    first = driving.start(engine, prompts, 17)
    tokens, samples = driving.finish(engine, first)
    assert [sample.tokens for sample in samples] == [5 * driving.STEPS_AT_ONCE] * 2
    assert all(sample.seconds > 0 for sample in samples)
    assert tokens == driving.generate(engine, prompts, 17)


def test_every_timed_token_is_counted_once(config, engine):
    free = engine.free_blocks
    case = driving.decode_case(config, batch=3, context=44, steps=16)
    samples = driving.time_decode(engine, config, case, repeats=2)
    assert case == DecodeCase(batch=3, prompt=36, steps=16)
    assert [sample.tokens for sample in samples] == [3 * 8] * (2 * 16 // 8)
    for prompts in (1, 2):
        samples = driving.time_prefill(engine, config, 90, repeats=3, prompts=prompts)
        assert [s.tokens for s in samples] == [90 * prompts] * 3
    whole = driving.time_end_to_end(engine, config, batch=4, prompt=8, new=12, repeats=2)
    assert [sample.tokens for sample in whole] == [4 * 12] * 2
    assert engine.free_blocks == free


def test_a_context_at_the_end_of_the_window_is_the_end_of_the_window():
    case = driving.decode_case(GPT2, batch=8, context=1023)
    assert case.prompt + case.new_tokens == GPT2.block_size
    assert case.context == 959 + 32.5
    assert driving.decode_case(GPT2, batch=8, context=128).context == 128.5


# ---- the check ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_the_engine_passes_against_its_own_weights(config, tensors, emulated_library, dtype):
    packed = weights.pack(config, dtype, tensors)
    engine = driving.open_engine(config, dtype, packed, emulated_library, sequences=8)
    reference = Gpt(config, weights.unpack(config, dtype, packed), "cpu")
    found = checking.check(config, dtype, engine, reference.logits, batch=10)
    assert found["failures"] == []
    assert 0 < found["95 tokens"]["relative_error"] < checking.RELATIVE_ERROR[dtype]
    assert found["48 tokens"]["unexplained"] == 0


def test_one_wrong_weight_fails(config, tensors, engine):
    wrong = dict(tensors)
    wrong["h.1.mlp.c_proj.weight"] = tensors["h.1.mlp.c_proj.weight"].copy()
    wrong["h.1.mlp.c_proj.weight"][7] *= -1
    found = checking.check(config, "bfloat16", engine, Gpt(config, wrong, "cpu").logits, batch=4)
    assert any("relative error" in failure for failure in found["failures"])


def test_nan_fails():
    exact = torch.randn(5, 7)
    logits = exact.numpy().copy()
    logits[2, 3] = np.nan
    agreement = checking.compare(logits, exact, [1, 2])
    assert [*checking._out_of_bounds(agreement, 1e-3)]


def test_a_token_may_differ_only_where_the_error_explains_it():
    exact = torch.tensor([[1.0, 0.99, 0.0], [0.0, 1.0, 5.0], [0.0, 0.0, 0.0]])
    logits = exact.numpy() + np.array([[-0.01, 0.01, 0.0]] * 3, np.float32)
    assert checking.compare(logits, exact, [0, 2])[2:] == (0, 0)
    assert checking.compare(logits, exact, [1, 2])[2:] == (1, 0)
    assert checking.compare(logits, exact, [2, 2])[2:] == (1, 1)


# ---- the roofline -------------------------------------------------------------------------------


def test_a_token_of_gpt2_in_bfloat16_reads_247_megabytes_and_its_cache():
    case = DecodeCase(batch=1, prompt=100, steps=1)  # attends to 101 positions
    cost = driving.decode_cost(GPT2, "bfloat16", case)
    cache = 101 * 2 * 12 * 768 * 2
    assert cost.bytes - cache == 2 * (12 * 12 * 768**2 + 50257 * 768)
    assert (cost.bytes - cache) / 1e6 == pytest.approx(247.1, abs=0.05)
    assert cost.flops == (cost.bytes - cache) + 4 * 12 * 768 * 101


def test_a_batch_reads_the_weights_once():
    one, eight = (driving.decode_cost(GPT2, "int8", DecodeCase(n, 100, 1)) for n in (1, 8))
    assert eight.bytes - one.bytes == 7 * 101 * 2 * 12 * 768 * 2
    assert eight.flops == 8 * one.flops


def test_the_slower_of_memory_and_arithmetic_is_the_limit():
    roof = Roof(bytes_per_second=2e12, flops_per_second=500e12)
    assert roof.share(Cost(bytes=2e9, flops=1e9), seconds=2e-3) == pytest.approx(0.5)
    assert roof.share(Cost(bytes=2e9, flops=1e12), seconds=4e-3) == pytest.approx(0.5)
    prefill = driving.prefill_cost(GPT2, "bfloat16", 512)
    assert prefill.flops == 2 * 12 * 12 * 768**2 * 512 + 2 * 12 * 768 * 512**2 + 2 * 50257 * 768
    together = driving.prefill_cost(GPT2, "bfloat16", 512, prompts=4)
    assert together.flops == 4 * prefill.flops
    assert together.bytes == prefill.bytes


# ---- records and tables -------------------------------------------------------------------------


def record(by, rate, part="decode", precision="bfloat16", **about):
    """A figure of one step of gpt2 that reads a billion bytes."""
    spread = {"median": rate, "low": 0.98 * rate, "high": 1.02 * rate}
    return {
        **{"part": part, "model": "gpt2", "precision": precision, "by": by, **about},
        "tokens_per_second": spread,
        "seconds": {"median": 1 / rate},
        "cost": {"bytes": 1e9, "flops": 1.2e9},
    }


def records():
    yardsticks = {
        "part": "yardsticks",
        "bytes_per_second": {"median": 2e12},
        "flops_per_second": {"median": 5e14},
    }
    agreement = {"relative_error": 3e-3, "max_difference": 2e-2, "other_tokens": 1}
    checked = {"part": "check", "model": "gpt2", "precision": "bfloat16", "bound": 2e-2}
    checked["kernels"] = "sm_90 wgmma"
    return [
        yardsticks,
        checked | {"96 tokens": agreement, "1023 tokens": agreement | {"relative_error": 4e-3}},
        {**checked, "by": "gptx", "status": "passed", "seconds_taken": 12.0},
        record("gptx", 1500.0, batch=1, context=128.5),
        record("gptx", 9000.0, batch=8, context=128.5),
        record("torch eager", 100.0, batch=1, context=128.5),
        record("torch graph", 1000.0, batch=1, context=128.5),
        record("gptx", 1500.0, batch=1, context=128.5, precision="int8"),
        {"part": "peers", "by": "torch eager", "status": "failed", "detail": "stopped after 9 s"},
    ]


def test_the_table_shows_medians_spread_and_share_and_what_is_missing():
    text = table.render({"records": records()})
    lines = text.splitlines()
    assert "a copy at 2.00 TB/s, products in bfloat16 at 500 TFLOP/s" in text
    assert "sm_90 wgmma, error 3.0e-03, 4.0e-03 of 2e-02, largest 2.0e-02, 2 near ties" in text
    rows = {" ".join(line[:34].split()): line[34:].split() for line in lines if "gpt2" in line}
    assert rows["gpt2 bfloat16 gptx"] == ["1,500", "±2%", "0.75", "9,000", "±2%", "4.50"]
    assert rows["gpt2 bfloat16 torch graph"] == ["1,000", "±2%", "0.50", "-"]
    assert rows["gpt2 bfloat16 gptx : best"] == ["1.50", "-"]
    assert rows["gpt2 int8 gptx"] == ["1,500", "±2%", "0.75", "-"]
    assert any("torch eager" in line and "stopped after 9 s" in line for line in lines)
    assert max(map(len, lines)) <= 140


def test_a_prompt_shows_its_arithmetic():
    text = table.render(
        {"records": [record("gptx", 1500.0, part="prefill", prompts=4, tokens=512)]}
    )
    assert text.splitlines()[-2].strip() == "4 x 512"
    assert text.splitlines()[-1].split() == ["gpt2", "bfloat16", "gptx", "1,500", "±2%", "2"]


def test_what_a_step_is_made_of_shows_times_and_rates():
    found = [
        {"part": "micro", "what": "kernel", "microseconds": 1.25, "bytes": 0},
        {"part": "micro", "what": "phase of one kernel", "microseconds": 2.0, "bytes": 4_000_000},
    ]
    rows = [line.split() for line in table.render({"records": found}).splitlines()[1:]]
    assert rows[0] == ["kernel", "0.00", "MB", "1.25", "µs"]
    assert rows[1][-6:] == ["4.00", "MB", "2.00", "µs", "2.00", "TB/s"]


def test_what_a_step_is_made_of_compiles(tmp_path):
    if build.nvcc() is None:
        pytest.skip("needs nvcc")
    build.compile_micro(tmp_path / "micro", 90)
    assert (tmp_path / "micro").exists()


@pytest.mark.gpu
def test_what_a_step_is_made_of_is_measured(tmp_path, gpu_library):
    from gpu_bench import process

    if build.nvcc() is None:
        pytest.skip("needs nvcc")
    found = [*process.micro({"weights": str(tmp_path / "weights")})]
    assert {record["what"] for record in found} > {"reading", "kernel", "phase of one kernel"}
    assert all(record["microseconds"] > 0 for record in found)


def test_a_run_that_measured_nothing_still_has_a_table():
    failed = {"part": "build", "status": "failed", "seconds_taken": 3.0, "detail": "no nvcc"}
    assert " ".join(table.render({"records": [failed]}).split()) == "build failed 3 s no nvcc"
    assert table.render({"records": []}) == ""


def test_figures_are_the_median_and_the_extremes_of_the_rates():
    from gpu_bench import process

    samples = [Sample(64, 0.1), Sample(64, 0.2), Sample(64, 0.4)]
    found = process.figures(samples, Cost(1.0, 2.0))
    assert found["tokens_per_second"] == {"median": 320, "low": 160, "high": 640}
    assert found["samples"] == [0.1, 0.2, 0.4]
    task = {"model": "gpt2", "precision": "bfloat16"}
    case = DecodeCase(batch=8, prompt=100, steps=64)
    cost = process.decode_figures(task, case, samples)["cost"]
    assert cost["bytes"] == 8 * driving.decode_cost(GPT2, "bfloat16", case).bytes


# ---- the command --------------------------------------------------------------------------------


def without_gpu(*arguments):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_a_gpu_it_says_so_in_one_line():
    done = without_gpu()
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "nothing to measure" in done.stderr


def test_a_run_is_shown_again_without_a_gpu(tmp_path):
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"records": records()}))
    done = without_gpu("--from-json", str(path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == table.render({"records": records()}) + "\n"


@pytest.mark.parametrize("option", ["--parts", "--models", "--precisions"])
def test_an_unknown_name_is_refused_with_those_that_are_known(option, capsys):
    with pytest.raises(SystemExit):
        gpu.parse_options([option, "nothing"])
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert "got 'nothing'" in message


def test_parts_run_in_their_order_each_after_its_weights(tmp_path):
    arguments = [
        "--parts",
        "peers,micro,check,decode,prefill",
        "--models",
        "gpt2",
        "--precisions",
        "int8",
    ]
    options = gpu.parse_options([*arguments, "--json", str(tmp_path / "out.json")])
    tasks = [
        " ".join(task.get(key, "") for key in ("part", "precision", "by")).strip()
        for task in gpu.Run(options, 90)._tasks()
    ]
    assert tasks == [
        *("weights float32", "check float32 gptx", "weights int8", "check int8 gptx", "micro"),
        *("decode int8 gptx", "prefill int8 gptx", "prefill int8 gptx by warps"),
        "peers int8 torch int8",
    ]


def test_every_peer_has_a_way_to_run():
    for precision, names in gpu.PEERS.items():
        for name in names:
            assert peers.PEERS[name.removeprefix("torch ")].precision == precision


def test_a_part_that_fails_or_takes_too_long_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(gpu.Run, "_command", lambda _self, task: commands[task["part"]])
    monkeypatch.setitem(gpu._SECONDS, "decode", 1)
    options = gpu.parse_options(["--json", str(tmp_path / "out.json")])
    run = gpu.Run(options, 90)
    line = json.dumps({"part": "prefill", "tokens": 5}) + "\n"
    write = f"open({str(tmp_path / 'out.jsonl')!r}, 'a').write({line!r})"
    commands = {
        "check": [sys.executable, "-c", "raise SystemExit('it is wrong')"],
        "decode": [sys.executable, "-c", "import time; time.sleep(60)"],
        "prefill": [sys.executable, "-c", write],
    }
    for part in commands:
        run._part({"part": part})
    statuses = [found for found in run.report()["records"] if "status" in found]
    assert [found["status"] for found in statuses] == ["failed", "failed", "done"]
    assert [found["detail"] for found in statuses] == ["it is wrong", "stopped after 1 s", ""]
    assert {"part": "prefill", "tokens": 5} in run.report()["records"]
    assert run.failed
    options.minutes = 0
    run._part({"part": "check"})
    assert run.report()["records"][-1]["detail"] == "no time was left"


def test_a_command_is_stopped_with_what_it_started(tmp_path):
    start = "import subprocess; child = subprocess.Popen(['sleep', '99'])"
    code = f"{start}; print(child.pid, flush=True); child.wait()"
    command = [sys.executable, "-c", code]
    done = processes.run(command, tmp_path / "log", limit=2, env=os.environ, cwd=tmp_path)
    assert done.status is None
    child = Path(f"/proc/{int(done.output)}/cmdline")
    for _ in range(100):
        if not child.exists() or not child.read_bytes():  # gone, or all but its exit status
            return
        time.sleep(0.1)
    pytest.fail("the child of a stopped command runs on")


def test_the_site_is_the_checkout_with_what_was_built(tmp_path):
    built = tmp_path / "cmake"
    built.mkdir()
    for name in ("_core.so", "libgptx_cuda.so"):
        (built / name).write_bytes(b"")
    build.link_site(tmp_path / "site", built)
    build.link_site(tmp_path / "site", built)
    package = tmp_path / "site" / "gptx"
    assert (package / "model.py").read_text() == (build.ROOT / "python/gptx/model.py").read_text()
    assert (package / "_core.so").resolve() == built / "_core.so"
    assert (package / "_lib" / "libgptx_cuda.so").resolve() == built / "libgptx_cuda.so"
    assert len([*package.glob("_core*.so")]) == 1
    configure, make = build.commands(built, 90)
    assert "-DGPTX_CUDA_ARCHS=90" in configure
    assert str(built) in make
