"""Kernels of CPUs that are not here, on emulators: the same bits as the scalar ones."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def build(folder, target, *options):
    configure = ["cmake", f"-S{ROOT}", f"-B{folder}", "-DGPTX_EXTENSION=OFF", "-DGPTX_CUDA=OFF"]
    run(*configure, "-DGPTX_NATIVE_TESTS=ON", "-DGPTX_WERROR=ON", *options)
    run("cmake", "--build", folder, "--parallel", "2", "--target", *target)
    return folder / "tests" / "native"


def need(*programs):
    for program in programs:
        if not shutil.which(program):
            pytest.skip(f"needs {program}")


def assert_equal_to_scalar(output, tables):
    """The last line says ok, and every table was compared."""
    assert output.endswith("ok\n")
    compared = dict(re.findall(r"^(\w+): (\d+) results", output, re.MULTILINE))
    assert sorted(compared) == sorted(tables)
    assert all(int(results) > 3000 for results in compared.values())


def test_avx512_kernels_emulated_on_avx2_give_the_bits_of_the_scalar_ones(tmp_path):
    need("cmake", "c++")
    cpuinfo = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpuinfo.exists() or "avx2" not in cpuinfo.read_text():
        pytest.skip("needs a CPU with AVX2")
    if not Path("/usr/include/simde").exists():
        pytest.skip("needs SIMDe: libsimde-dev")
    tables = ["avx512", "avx512_vnni", "avx512_bf16", "avx512_amx"]
    programs = build(tmp_path, ["kernel_test_emulated"])
    assert_equal_to_scalar(run(programs / "kernel_test_emulated", *tables), tables)


@pytest.fixture(scope="module")
def arm_programs(tmp_path_factory):
    compiler = "aarch64-linux-gnu-g++"
    need("cmake", compiler, "qemu-aarch64")
    return build(
        tmp_path_factory.mktemp("aarch64"),
        ["kernel_test", "core_test"],
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={compiler}",
        # The kernels keep their own level.
        "-DCMAKE_CXX_FLAGS_RELEASE=-O1",
    )


def run_on_arm(cpu, *command):
    return run("qemu-aarch64", "-cpu", cpu, "-L", "/usr/aarch64-linux-gnu", *command)


def test_neon_kernels_on_an_emulated_arm_give_the_bits_of_the_scalar_ones(arm_programs):
    tables = ["neon", "neon_dotprod", "neon_i8mm"]
    assert_equal_to_scalar(run_on_arm("max", arm_programs / "kernel_test", *tables), tables)


def test_an_emulated_arm_without_the_dot_product_takes_the_plain_kernels(arm_programs):
    assert_equal_to_scalar(run_on_arm("cortex-a53", arm_programs / "kernel_test"), ["neon"])


def test_the_core_runs_on_an_emulated_arm(arm_programs):
    assert run_on_arm("max", arm_programs / "core_test", "neon_i8mm") == "ok\n"
