"""Engines: a model that answers the protocol of `protocol.py`. Importing this package imports no torch."""
