"""Chain-of-thought data from a teacher model."""
