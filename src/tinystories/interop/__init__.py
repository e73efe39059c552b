"""The same model in other programs."""
