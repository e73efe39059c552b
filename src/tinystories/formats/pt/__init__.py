"""State dicts saved by torch.save."""
