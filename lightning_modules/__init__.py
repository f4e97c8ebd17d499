"""The policy, rollouts, rewards, objectives, and the LightningModules CoTSFT and GRPO."""
