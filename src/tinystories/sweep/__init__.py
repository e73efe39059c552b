"""Hyperparameter search: many trainings, one study."""
