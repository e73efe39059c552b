"""Data: stories of any source, to token files, to training batches. Knows nothing of models."""
