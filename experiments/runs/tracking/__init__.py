"""What a run sends to W&B beside its metrics."""
