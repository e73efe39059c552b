"""Muon and AdamW, and the learning rates they use."""
