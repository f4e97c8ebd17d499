"""Parts of every training run: optimizer, seeds, strategy, checks of settings, and the ways in which a run ends."""
