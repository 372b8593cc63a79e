"""The benchmark runs, checks before it times, and says what it left out."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import checking
import report
import run
import workloads
from peers import PEERS, PRECISIONS, VARIANTS, PeerEntry, reason_to_skip, select
from workloads import Storage

RUN = Path(__file__).parent.parent / "bench" / "run.py"
GPT2 = workloads.config_named("gpt2")


def bench(*arguments):
    return subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
    )


def result(precision, decode, first=0.1):
    """A measured variant that decodes so many tokens per second."""
    medians = {row.figure: 1.0 for row in report.ROWS}
    medians |= {
        "decode_tokens_per_second": decode,
        "batch_tokens_per_second": 8 * decode,
        "first_token_seconds": first,
    }
    return {
        "precision": precision,
        "setting": {},
        "versions": {},
        "figures": {
            name: {"median": value, "low": value, "high": value} for name, value in medians.items()
        },
    }


def measured():
    """A report of two precisions, one variant of which failed."""
    return {
        "time": "2030-01-01T00:00:00",
        "machine": {"cpu": "a CPU", "cpus": 2, "isas": ["avx2"], "system": "Linux"},
        "versions": {"commit": "abc"},
        "settings": {
            **{"name": "gpt2", "dtype": "float32", "threads": 2},
            **{"repeat": 1, "passes": 1, "quick": True},
        },
        "parameters": 1_000_000,
        "workload": {"prefill": [1] * 9, "decode": [1] * 5, "batch": [[1]] * 3, "n_decode": 4},
        "variants": {
            "gptx:float32": result("float32", 60.0),
            "transformers:float32": result("float32", 20.0, first=0.3),
            "llama.cpp:f32": result("float32", 40.0, first=0.2),
            "gptx:int8": result("int8", 100.0),
            "llama.cpp:q8_0": {"precision": "int8", "failed": "it is wrong"},
            "openvino:int8": {"precision": "int8", "skipped": "not installed: openvino (pip)"},
        },
    }


# ---- the whole script, in small ----------------------------------------------------------------


def test_the_tables_and_every_sample_are_written_and_shown_again(tmp_path):
    path = tmp_path / "out.json"
    chosen = ("--peers", "transformers:float32", "--precisions", "float32,bfloat16")
    first = bench("--shape", "tiny", "--quick", "--json", path, *chosen)
    assert first.returncode == 0, first.stderr
    for row in ("prefill", "first token", "decode, batch 1", "share of the read", "load"):
        assert first.stdout.count(f"| {row}") + first.stdout.count(f"| · {row}") == 2
    found = json.loads(path.read_text())["variants"]
    assert list(found) == ["gptx:float32", "gptx:bfloat16", "transformers:float32"]
    for variant in found.values():
        assert variant["check"]["passed"]
        assert len(variant["rounds"]) == 2
    again = bench("--from-json", path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == first.stdout


# ---- arguments ----------------------------------------------------------------------------------


def test_by_default_every_variant_is_measured():
    assert run.parse_options([]).variants == [*VARIANTS.values()]


def test_a_peer_or_one_of_its_variants_can_be_chosen_and_gptx_always_is():
    keys = [variant.key for variant in select(["ctranslate2", "llama.cpp:q8_0"], ["int8"])]
    assert keys == ["gptx:int8", "gptx:int8-fast", "llama.cpp:q8_0", "ctranslate2:int8"]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--peers", "nobody"),
        ("--peers", "ctranslate2:int3"),
        ("--precisions", "int3"),
        ("--threads", "0"),
    ],
)
def test_an_unknown_name_is_refused_by_name(option, value, capsys):
    with pytest.raises(SystemExit) as refused:
        run.parse_options([option, value])
    assert refused.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert option in message
    assert value in message


def test_a_peer_that_is_not_installed_is_named_with_the_command_that_installs_it():
    reason = reason_to_skip(PeerEntry("m", ("json", "no_such_module"), "pip install it"))
    assert reason == "not installed: no_such_module (pip install it)"
    assert reason_to_skip(PeerEntry("m", ("json",))) == ""


def test_every_variant_belongs_to_a_peer_and_a_precision():
    for variant in VARIANTS.values():
        assert variant.peer in PEERS
        assert variant.precision in PRECISIONS
    for name, entry in PEERS.items():
        assert entry.install or name == "gptx"


# ---- bytes per token ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "megabytes"),
    [
        ("gptx:float32", 494.1),
        ("gptx:bfloat16", 247.1),
        ("transformers:bfloat16", 247.1),
        ("llama.cpp:q8_0", 131.3),
        ("llama.cpp:q4_0", 69.5),
    ],
)
def test_the_weights_of_gpt2_are_read_once_as_they_are_stored(key, megabytes):
    size = workloads.step_bytes(GPT2, VARIANTS[key].storage, [])
    assert size / 1e6 == pytest.approx(megabytes, abs=0.05)


def test_int8_reads_a_byte_for_each_weight_and_the_scale_and_sum_of_each_row():
    weights = workloads.block_weights(GPT2) + workloads.head_weights(GPT2)
    rows = 12 * (3 + 1 + 4 + 1) * 768 + 50257
    assert workloads.step_bytes(GPT2, VARIANTS["gptx:int8"].storage, []) == weights + 8 * rows


def test_a_step_reads_the_cache_of_each_sequence():
    storage = Storage(0, cache=2)
    assert workloads.step_bytes(GPT2, storage, [10, 20]) == 2 * (2 * 12 * 768) * 30


# ---- the rule of the check ----------------------------------------------------------------------


def check(precision, logits, tokens, margins=((1.0, 1.0, 1.0),)):
    reference = np.array([[1.0, 0.0, -1.0], [0.0, 3.0, 1.0]], dtype=np.float32)
    return checking.compare(
        precision,
        reference + np.float32(logits),
        {"call": [list(tokens)]},
        reference,
        {"call": [[1, 2, 3]]},
        {"call": [list(margin) for margin in margins]},
        1e-4,
    )


def test_float32_passes_with_close_logits_and_equal_tokens():
    found = check("float32", 1e-5, (1, 2, 3))
    assert found["passed"]
    assert found["tokens_equal"]
    assert found["tolerance"] == pytest.approx(3e-4)


def test_float32_fails_where_a_logit_is_off():
    assert not check("float32", 1e-3, (1, 2, 3))["passed"]


def test_float32_fails_where_a_clear_token_differs():
    assert not check("float32", 0.0, (1, 0, 3))["passed"]


def test_float32_may_choose_the_other_token_of_a_tie_and_go_on_from_there():
    found = check("float32", 0.0, (1, 0, 7), margins=((1.0, 1e-5, 1.0),))
    assert found["passed"]
    assert not found["tokens_equal"]


def test_a_missing_token_is_no_tie():
    assert not check("float32", 0.0, (1, 2), margins=((0.0, 0.0, 0.0),))["passed"]


def test_a_rounded_model_may_differ_by_its_rounding_and_choose_other_tokens():
    found = check("int8", 0.05, (5, 6, 7))
    assert found["passed"]
    assert found["top1_agreement"] == 1
    assert found["max_logit_difference"] == pytest.approx(0.05, rel=1e-3)


def test_another_model_is_not_taken_for_a_rounded_one():
    wrong = [[-3.0, 1.0, 2.0], [2.0, -4.0, 2.0]]
    for precision in ("bfloat16", "int8", "int4"):
        assert not check(precision, wrong, (1, 2, 3))["passed"]


def test_logits_of_another_shape_fail():
    logits = np.zeros((2, 3), dtype=np.float32)
    found = checking.compare("int8", logits[:1], {}, logits, {}, {}, 1e-4)
    assert not found["passed"]


# ---- the tables ---------------------------------------------------------------------------------


def test_variants_are_grouped_by_precision_and_only_where_measured():
    groups = report.grouped(measured()["variants"])
    assert {name: [*group] for name, group in groups.items()} == {
        "float32": ["gptx:float32", "transformers:float32", "llama.cpp:f32"],
        "int8": ["gptx:int8"],
    }


def test_the_ratio_is_to_the_fastest_peer_of_the_row():
    group = report.grouped(measured()["variants"])["float32"]
    rows = {row.figure: row for row in report.ROWS}
    ratios = {
        name: report.ratio_to_fastest_peer(group, "gptx:float32", rows[name])
        for name in ("decode_tokens_per_second", "first_token_seconds", "arithmetic_peak")
    }
    assert ratios["decode_tokens_per_second"] == pytest.approx(60 / 40)
    assert ratios["first_token_seconds"] == pytest.approx(0.2 / 0.1)
    assert ratios["arithmetic_peak"] is None


def test_a_group_without_peers_has_no_ratio():
    group = report.grouped(measured()["variants"])["int8"]
    assert report.ratio_to_fastest_peer(group, "gptx:int8", report.ROWS[0]) is None


def test_every_table_is_rectangular_and_what_is_missing_is_named():
    text = report.tables(measured())
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        widths = {line.count("|") for line in table.splitlines()}
        assert len(widths) == 1
    assert "Failed: llama.cpp:q8_0: it is wrong." in text
    assert "Skipped: openvino:int8: not installed: openvino (pip)." in text


def test_the_chart_is_drawn_as_png_and_svg(tmp_path):
    pytest.importorskip("matplotlib")
    import chart

    paths = chart.draw(measured(), tmp_path / "chart.png")
    assert [path.name for path in paths] == ["chart.png", "chart.svg"]
    assert paths[0].read_bytes().startswith(b"\x89PNG")
    assert "llama.cpp f32" in paths[1].read_text()


def test_the_engine_benchmark_checks_and_compares(tmp_path):
    path = tmp_path / "engine.json"
    command = [sys.executable, RUN.with_name("engine.py"), "--shape", "tiny", "--rounds", "1"]
    result = subprocess.run([*command, "--json", path], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(path.read_text())["figures"]
    for name in (
        "64 requests together : one after another",
        "repeated prefix of 512 : its prefill",
        "prompt lookup, other text",
        "choose among 4 : one prefill",
        "embed a text : its prefill",
        "guided : free tokens/s, JSON of known keys",
    ):
        assert figures[name]["median"] > 0
        assert f"| {name} |" in result.stdout


def test_the_engine_benchmark_refuses_an_unknown_part():
    command = [sys.executable, RUN.with_name("engine.py"), "--parts", "everything"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "expected some of ragged, prefix, lookup, choose" in result.stderr
