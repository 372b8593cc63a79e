"""One part in a process of its own: ``python -m gpu_bench.process TASK``, started by gpu.py.

The task is JSON: the part, what it is about, and the file that each record is appended to as soon
as it is known, so that a process that is stopped loses only what it was at.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from gptx import _core, cuda
from gpu_bench import build, driver, driving, weights
from gpu_bench.driving import Sample
from gpu_bench.roofline import Cost
from measuring import Spread

BATCHES = (1, 8, 64)
CONTEXTS = (128, 1023)
PREFILL = ((1, 512), (1, 1023), (4, 512))  # prompts, tokens of each
_PEERS_PROMPT = 512

Task = dict[str, Any]
Records = Iterator[dict[str, Any]]


def main() -> None:
    task = json.loads(sys.argv[1])
    named = {key: value for key, value in task.items() if key not in ("records", "weights")}
    for record in PARTS[task["part"]](task):
        with Path(task["records"]).open("a") as out:
            out.write(json.dumps(named | record) + "\n")


def figures(samples: Sequence[Sample], cost: Cost) -> dict[str, Any]:
    """What the JSON holds of timed calls, each of which is ``cost``."""
    rates = [sample.tokens / sample.seconds for sample in samples]
    seconds = [sample.seconds for sample in samples]
    return {
        "tokens_per_second": dataclasses.asdict(Spread.of(rates)),
        "seconds": dataclasses.asdict(Spread.of(seconds)),
        "samples": seconds,
        "cost": dataclasses.asdict(cost),
    }


def decode_figures(task: Task, case: driving.DecodeCase, samples: Sequence[Sample]) -> Task:
    """Of calls that give some tokens of each sequence."""
    step = driving.decode_cost(weights.config_named(task["model"]), task["precision"], case)
    steps = samples[0].tokens / case.batch
    cost = Cost(step.bytes * steps, step.flops * steps)
    return {
        "batch": case.batch,
        "context": case.context,
        "prompt_tokens": case.prompt,
        **figures(samples, cost),
    }


def cases(task: Task) -> list[driving.DecodeCase]:
    config = weights.config_named(task["model"])
    return [
        driving.decode_case(config, batch, context) for context in CONTEXTS for batch in BATCHES
    ]


def describe(_task: Task) -> Records:
    """The machine, and what runs on it."""
    import torch

    import machine

    found = cuda.status()
    yield {
        "machine": machine.describe_machine() | {"gpu": driver.describe()},
        "devices": [dataclasses.asdict(device) for device in found.devices],
        "versions": machine.describe_versions()
        | {
            "platform": platform.platform(),
            "torch": torch.__version__,
            "cuda_driver": found.driver_version,
            "cuda_runtime": found.runtime_version,
            "gptx_cuda": found.build,
            "library": str(cuda.library_path()),
        },
    }


def yardsticks(_task: Task) -> Records:
    """The limits of the device: a copy far beyond its caches, and a large product."""
    import torch

    def rates(work: Callable[[], object], amount: float, repeats: int = 20) -> dict[str, float]:
        found = []
        for repeat in range(5 + repeats):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            work()
            torch.cuda.synchronize()
            if repeat >= 5:
                found.append(amount / (time.perf_counter() - begin))
        return dataclasses.asdict(Spread.of(found))

    source, target = torch.randn(2, 2**30, device="cuda")
    copied = rates(lambda: target.copy_(source), 2 * source.nbytes)
    n = 8192
    a, b, out = (torch.randn(n, n, device="cuda").bfloat16() for _ in range(3))
    computed = rates(lambda: torch.mm(a, b, out=out), 2 * n**3)
    yield {"bytes_per_second": copied, "flops_per_second": computed, "gpu": driver.describe()}


def prepare(task: Task) -> Records:
    begin = time.perf_counter()
    path = weights.prepare(Path(task["weights"]), task["model"], task["precision"])
    yield {"bytes": path.stat().st_size, "seconds": time.perf_counter() - begin}


def open_engine(task: Task, sequences: int) -> _core.Engine:
    precision = task["precision"]
    packed = weights.load(Path(task["weights"]), task["model"], precision)
    config = weights.config_named(task["model"])
    return driving.open_engine(config, precision, packed, str(cuda.library_path()), sequences)


def check(task: Task) -> Records:
    import torch

    from gpu_bench import checking
    from gpu_bench.torch_gpt import Gpt

    torch.set_float32_matmul_precision("highest")
    config = weights.config_named(task["model"])
    packed = weights.load(Path(task["weights"]), task["model"], task["precision"])
    reference = Gpt(config, weights.unpack(config, task["precision"], packed), "cuda")
    engine = open_engine(task, sequences=16)
    found = checking.check(config, task["precision"], engine, reference.logits)
    found["kernels"] = engine.isa
    if found["failures"]:
        found["failed"] = "; ".join(found["failures"])
    yield found


def micro(task: Task) -> Records:
    """What a step is made of, measured by a program of its own."""
    program = Path(task["weights"]).parent / "micro"
    program.parent.mkdir(parents=True, exist_ok=True)
    build.compile_micro(program, driver.compute_capability())
    with subprocess.Popen([program], stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        yield from map(json.loads, running.stdout)
    if running.returncode != 0:
        raise SystemExit(f"{program} ended with {running.returncode}")


def decode(task: Task) -> Records:
    config = weights.config_named(task["model"])
    engine = open_engine(task, sequences=max(BATCHES))
    for case in cases(task):
        samples = driving.time_decode(engine, config, case, repeats=2)
        yield decode_figures(task, case, samples)


def prefill(task: Task) -> Records:
    config = weights.config_named(task["model"])
    if task["by"] == "gptx by warps":
        os.environ["GPTX_CUDA_WGMMA"] = "0"
    engine = open_engine(task, sequences=4)
    for prompts, tokens in PREFILL:
        samples = driving.time_prefill(engine, config, tokens, repeats=20, prompts=prompts)
        cost = driving.prefill_cost(config, task["precision"], tokens, prompts)
        about = {"prompts": prompts, "tokens": tokens, "kernels": engine.isa}
        yield about | figures(samples, cost)


def end_to_end(task: Task) -> Records:
    config = weights.config_named(task["model"])
    engine = open_engine(task, sequences=max(BATCHES) // 4)  # 160 of 1024 tokens
    prompt, new = 32, 128
    for batch in BATCHES:
        samples = driving.time_end_to_end(engine, config, batch, prompt, new, repeats=5)
        contexts = driving.DecodeCase(batch, prompt, new)
        step = driving.decode_cost(config, task["precision"], contexts)
        cost = Cost(step.bytes * new, step.flops * (prompt + new))
        yield {
            "batch": batch,
            "prompt_tokens": prompt,
            "new_tokens": new,
            **figures(samples, cost),
        }


def peers(task: Task) -> Records:
    import torch

    from gpu_bench import peers as torch_peers

    torch.set_float32_matmul_precision("highest")
    config = weights.config_named(task["model"])
    packed = weights.load(Path(task["weights"]), task["model"], task["precision"])
    tensors = weights.unpack(config, task["precision"], packed)
    del packed
    name = task["by"].removeprefix("torch ")
    for record in torch_peers.measure(config, tensors, name, cases(task), _PEERS_PROMPT, "cuda"):
        samples, case = record.pop("samples", None), record.pop("case", None)
        if samples is None:
            record |= {"batch": case.batch, "context": case.context}
        elif record["part"] == "decode":
            record |= decode_figures(task, case, samples)
        else:
            cost = driving.prefill_cost(config, task["precision"], record["tokens"])
            record |= {"prompts": 1} | figures(samples, cost)
        yield record


def tiny(_task: Task) -> Records:
    """Every precision and cache on a model of two layers: something a sanitizer can watch."""
    from gptx.config import GPTConfig

    config = GPTConfig(vocab_size=211, block_size=192, n_layer=2, n_head=3, n_embd=60, n_inner=240)
    tensors = weights.PooledTensors(config)
    runs = 0
    for dtype, precision in (
        *((name, name) for name in ("float32", "bfloat16", "int8")),
        ("int8", "int8-fast"),
    ):
        packed = weights.pack(config, dtype, tensors)
        for cache in ("float32", "bfloat16", "int8"):
            options = {"precision": precision, "kv_cache_dtype": cache}
            engine = driving.open_engine(
                config, dtype, packed, str(cuda.library_path()), sequences=8, **options
            )
            lengths = (1, 5, 64, 130)
            driving.generate(engine, driving.random_prompts(config, lengths), 20)
            driving.generate(engine, driving.random_prompts(config, [3] * 12), 9)
            engine.logits(driving.random_prompts(config, [100])[0])
            runs += 1
    yield {"runs": runs}


PARTS: dict[str, Callable[[Task], Records]] = {
    "machine": describe,
    "yardsticks": yardsticks,
    "weights": prepare,
    "check": check,
    "micro": micro,
    "decode": decode,
    "prefill": prefill,
    "end_to_end": end_to_end,
    "peers": peers,
    "tiny": tiny,
}

if __name__ == "__main__":
    main()
