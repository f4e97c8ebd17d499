"""Compare a GRPO or SFT step of this project with TRL, on the same weights, prompts, images and lengths."""
