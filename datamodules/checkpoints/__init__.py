"""Model folders on disk: checks before loading, and loading."""
