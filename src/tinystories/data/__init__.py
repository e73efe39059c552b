"""Data pipeline: read stories from any source, tokenize them to files, serve training batches. No model code."""
