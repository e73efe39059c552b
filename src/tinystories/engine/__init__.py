"""Inference engines: implementations of the `Engine` protocol in `protocol.py`. Importing this package does not import
torch.
"""
