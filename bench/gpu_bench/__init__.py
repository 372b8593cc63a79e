"""The parts of ``bench/gpu.py``: gptx on a GPU, checked and timed beside torch on the same weights.

`driver`, `build`, `processes` and `table` need Python alone, since they work before gptx is built;
`process` is what each part runs in, with everything else behind it.
"""
