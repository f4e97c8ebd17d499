"""Model folders on disk: what must hold before one is loaded."""
