"""CPU inference without torch: JIT-compiled kernels on weights as they lie in the file. See docs/cpu-engine.md."""
