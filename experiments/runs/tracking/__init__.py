"""W&B artefacts of a run."""
