"""Measuring a model. Importing this package imports no torch."""
