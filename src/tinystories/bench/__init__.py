"""Benchmark harness: other programs with the same weights, each in a process of its own."""
