"""CPU inference without torch: JIT-compiled kernels over memory-mapped weights. See docs/cpu-engine.md."""
