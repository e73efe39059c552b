"""From logits to stories: sampling, whole characters, stop rules. Importing this package imports no torch."""
