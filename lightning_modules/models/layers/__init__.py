"""Layers: LoRA, fused kernels, and fast linear products."""
