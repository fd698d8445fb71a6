"""Does it work on this GPU? `run` (the program), `checks` (the nine checks), `place` (a GPU, or the fake libcuda).

    python -m vattn.bench.gpu.smoke

A package of its own, so that the suite's list of benchmarks does not load it.
"""
