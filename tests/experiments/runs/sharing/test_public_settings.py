"""What a model card says about settings holds no server, no private path and no name of a key."""

from __future__ import annotations

import copy

import pytest

from experiments.runs.sharing.model_card import card_text
from experiments.runs.sharing.public_settings import public
from lightning_modules.rollouts.vllm.server_checks import VLLMSettings

JUDGE = {
    "class_path": "lightning_modules.rl.rewards.judge.Judge",
    "init_args": {
        "base_url": "http://judge.internal:8000/v1",
        "model": "/srv/models/qwen-judge",
        "api_key_env": "JUDGE_KEY",
        "highest": 10,
    },
    "weight": 0.5,
}
CONFIG = {
    "experiment": "mine",
    "phase": "grpo",
    "model": {
        "class_path": "lightning_modules.grpo.GRPO",
        "init_args": {
            "model": "/home/jane/work/outputs/mine/cot_sft/merged",
            "lora": {"rank": 4, "alpha": 8},
            "freeze_vision": True,
            "learning_rate": 1e-4,
            "rollout": {
                "group_size": 8,
                "engine": "vllm",
                "vllm": vars(VLLMSettings(("http://gpu7.internal:8000/v1",), adapters="/home/jane/adapters"))
                | {"api_key_env": "ROLLOUT_KEY"},
                "log": "/home/jane/rollouts.jsonl",
            },
            "rewards": [JUDGE, {"class_path": "my_rewards.short"}],
        },
    },
    "data": {"shards": {"/home/jane/pool/all": 0.5, "data/mgrounding/all": 0.25, "https://data.internal/shards": 0.25}},
}


def card(**init_args: object) -> str:
    config = copy.deepcopy(CONFIG)
    config["model"]["init_args"] |= init_args
    return card_text("mine: grpo", config, [], {}, "abc")


def test_a_card_names_no_server_no_private_path_and_no_key() -> None:
    text = card()
    for private in ("internal", "jane", "/srv", "/home", "_KEY", "OPENAI", "vllm:", "rollouts.jsonl"):
        assert private not in text, private
    assert "started from: `…/outputs/mine/cot_sft/merged`" in text
    assert "…/all" in text and "data/mgrounding/all" in text and "(an address)" in text
    assert "group_size: 8, engine: vllm" in text and "'highest': 10" in text and "my_rewards.short" in text
    assert "…/qwen-judge" in text


@pytest.mark.parametrize("init_args", [{"lora": None}, {"lora": None, "freeze_vision": False}])
def test_a_card_says_that_all_weights_were_trained(init_args: dict) -> None:
    text = card(**init_args)
    assert "| `lora` | none: all weights of the language model are trained |" in text
    assert f"| `freeze_vision` | {init_args.get('freeze_vision', True)} |" in text
    assert "all weights" not in card() and "| `lora` | rank: 4, alpha: 8 |" in card()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("outputs/nano/cot_sft/merged", "outputs/nano/cot_sft/merged"),
        ("Qwen/Qwen2.5-VL-7B-Instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("/home/jane/models/base", "…/base"),
        ("~/models/base", "…/base"),
        ("~jane/models/base", "…/base"),
        ("../jane/base", "…/base"),
        ("C:\\Users\\jane\\base", "…/base"),
        ("/", "…"),
        ("{/home/jane/a,/home/jane/b}", "{…/a,…/b}"),
        ("./../secret/x", "…/x"),
        ("data/../../jane", "…/jane"),
        ("s3://bucket/shards", "(an address)"),
        ("hf://datasets/owner/name/shards", "hf://datasets/owner/name/shards"),
        ("pipe:ssh gpu7 cat /data/{}", "(a command)"),
        ("ask http://a.b:1/v1, or {text}", "ask (an address), or {text}"),
        ("~5 words", "~5 words"),
        (0.5, 0.5),
        (None, None),
    ],
)
def test_texts_are_shown_without_what_is_private(text: object, shown: object) -> None:
    assert public(text) == shown
    assert public({"a": [text], "api_key": text, "basic_auth_env": text}) == {"a": [shown]}


def test_two_sources_of_the_same_name_keep_their_weights() -> None:
    assert public({"/a/all": 0.5, "/b/all": 0.25}) == {"…/all": 0.5, "…/all (2)": 0.25}
    assert public({"max_tokens": 16, "targets": ["q_proj"]}) == {"max_tokens": 16, "targets": ["q_proj"]}
