"""One run on disk and on W&B."""
