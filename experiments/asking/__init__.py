"""Ask models about your own images: from Python, as a command, and on a local page."""
