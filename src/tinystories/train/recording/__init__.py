"""What a run leaves behind beside its checkpoints: metrics, samples, the loss curve."""
