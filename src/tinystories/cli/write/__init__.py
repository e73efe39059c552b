"""Commands that write stories, and what they need: generate, quantize, warmup."""
