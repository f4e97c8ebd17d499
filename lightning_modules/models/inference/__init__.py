"""The model without gradients, rewritten for fast sampling on a CPU or a GPU."""
