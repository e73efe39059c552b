"""A forward pass in NumPy that keeps what happens inside: hidden states, attention. Needs neither torch nor Numba."""
