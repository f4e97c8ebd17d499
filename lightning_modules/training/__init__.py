"""What every training run shares: optimizer, seeds, strategy, and how a run ends."""
