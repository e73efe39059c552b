"""CPU inference without torch: JIT-compiled kernels that read the weights as they lie in the file. See docs/cpu-engine.md."""
