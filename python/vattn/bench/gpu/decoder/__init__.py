"""A decoder to measure with: `model` (a plain Llama), `kernels` (attention), `memories` (where keys and values lie).

A package of its own, since it needs torch and the suite's list of benchmarks does not.
"""
