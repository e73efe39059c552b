"""Decoding on a CPU: kernels for products of few rows, where reading the weights is nearly all of the work."""
