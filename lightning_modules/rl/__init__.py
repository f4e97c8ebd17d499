"""Reinforcement learning: rewards, advantages, losses, and the log of rollouts."""
