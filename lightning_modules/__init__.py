"""The policy, rollouts, rewards, objectives, and the systems CoTSFT and GRPO."""
