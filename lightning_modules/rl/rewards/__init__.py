"""Rewards: what a completion earns, the rewards that come with the project, and the weighted list of a run."""
