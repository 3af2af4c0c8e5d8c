"""Benchmarks of the kernels, and what their compiler makes of them. Reached as `fastgrpo bench …` from a checkout."""
