"""Layers: LoRA, fused kernels, and faster linear layers."""
