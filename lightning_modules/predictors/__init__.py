"""Models that answer questions over images."""
