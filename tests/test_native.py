"""The core and the emulated CUDA backend under the sanitizers, built without Python."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("sanitizer", "tests"),
    [
        ("address,undefined", ["core_test", "kernel_test", "cuda_test"]),
        ("thread", ["core_test"]),
    ],
)
def test_the_core_is_clean_under(sanitizer, tests, tmp_path):
    if not shutil.which("cmake"):
        pytest.skip("needs cmake")
    flags = f"-fsanitize={sanitizer} -fno-sanitize-recover=all -O1 -g1"
    configure = [
        "cmake",
        f"-S{ROOT}",
        f"-B{tmp_path}",
        f"-DCMAKE_CXX_FLAGS={flags}",
        "-DCMAKE_BUILD_TYPE=None",
        "-DGPTX_EXTENSION=OFF",
        "-DGPTX_NATIVE_TESTS=ON",
        "-DGPTX_CUDA=OFF",
    ]
    build = ["cmake", "--build", str(tmp_path), "--parallel", "2", "--target", *tests]
    for command in (configure, build):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    # Fixed addresses: some kernels place mappings where the thread sanitizer does not expect them.
    runner = ["setarch", "-R"] if shutil.which("setarch") else []
    for test in tests:
        program = tmp_path / "tests" / "native" / test
        done = subprocess.run([*runner, str(program)], capture_output=True, text=True)
        assert done.stdout.endswith("ok\n"), done.stderr[-5000:]
