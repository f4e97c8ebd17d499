"""The policy, and all code that depends on the structure of Qwen2.5-VL."""
