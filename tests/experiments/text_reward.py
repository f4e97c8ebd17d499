"""Runs experiments.train with a reward that an untrained model earns too: how many vowels its answer has.

With STOP_SIGNAL and STOP_AT in the environment the run gets that signal at that call of the reward, in mid-batch; of
several ranks, with STOP_RANK, that one alone.
"""

import os
import sys
import time
from pathlib import Path

from lightning_modules.rl.rewards.reward_list import Reward, RewardList
from tests.lightning_modules.grpo_modules import by_text, flat_reward

calls = 0


def count_vowels(text: str, *_: object) -> Reward:
    global calls
    calls += 1
    chosen = os.environ.get("STOP_RANK") in (None, os.environ.get("RANK", os.environ.get("LOCAL_RANK")))
    if chosen and calls == int(os.environ.get("STOP_AT", 0)):
        if "STOP_RANK" in os.environ:
            Path(sys.argv[sys.argv.index("--config") + 1]).with_name("killed_at").write_text(str(time.time()))
        os.kill(os.getpid(), int(os.environ["STOP_SIGNAL"]))
    share = sum(letter in "aeiou" for letter in text) / (1 + len(text))
    return flat_reward(share)


if __name__ == "__main__":
    RewardList.score = by_text(count_vowels)
    from experiments import train

    train.main()
