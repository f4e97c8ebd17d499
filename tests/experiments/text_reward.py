"""Runs experiments.train with a reward that an untrained model earns too: how many vowels its answer has.

With STOP_SIGNAL and STOP_AT in the environment the run gets that signal at that call of the reward, in mid-batch.
"""

import os

from lightning_modules import grpo
from lightning_modules.rewards import Reward

calls = 0


def count_vowels(text: str, *_: object) -> Reward:
    global calls
    calls += 1
    if calls == int(os.environ.get("STOP_AT", 0)):
        os.kill(os.getpid(), int(os.environ["STOP_SIGNAL"]))
    share = sum(letter in "aeiou" for letter in text) / (1 + len(text))
    return Reward(share, share, 0.0, None)


if __name__ == "__main__":
    grpo.reward = count_vowels
    from experiments import train

    train.main()
