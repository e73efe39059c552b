"""Training: the run, its loop, optimizers and checkpoints, and hyperparameter sweeps over many runs."""
