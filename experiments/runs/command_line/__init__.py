"""Command lines: words are completed and checked before torch and Lightning, which take seconds, are imported."""
