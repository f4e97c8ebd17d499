"""Attention over one prompt and its completions."""
