"""Runs experiments.train with a reward that an untrained model earns too: how many vowels its answer has."""

from lightning_modules import grpo
from lightning_modules.rewards import Reward


def count_vowels(text: str, *_: object) -> Reward:
    share = sum(letter in "aeiou" for letter in text) / (1 + len(text))
    return Reward(share, share, 0.0, None)


if __name__ == "__main__":
    grpo.reward = count_vowels
    from experiments import train

    train.main()
