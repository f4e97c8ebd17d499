"""The policy and everything that knows the inside of Qwen2.5-VL."""
