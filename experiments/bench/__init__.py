"""A GRPO or SFT step of this project beside TRL's on the same weights, prompts, images and lengths."""
