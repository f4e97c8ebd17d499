"""From a sample to a prompt and tensors."""
