"""Story generation: sampling, continuous batching, detokenizing. Importing this package does not import torch."""
