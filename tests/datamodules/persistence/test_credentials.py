"""What counts as a password or key in a text, and that hiding leaves nothing of it."""

from __future__ import annotations

import pytest

from datamodules.persistence.credentials import find_credential, hide_credentials

SECRETS = [
    "http://user:PASSW0RD@host/v1",
    "https://PASSW0RD@huggingface.co/org/model",
    "s3://user:PASS@W0RD@bucket/shard-000.tar",
    "['http://a/v1', 'http://user:PASSW0RD@b/v1']",
    "https://host/shard.tar?X-Amz-Signature=PASSW0RD&x=1",
    "https://host/v1?model=a&api_key=PASSW0RD",
    "sk-PASSW0RD0123456789",
    "hf_PASSW0RD0123456789abcd",
    "AKIAPASSW0RD01234567",
    "Authorization: Bearer PASSW0RD.0123",
    '--endpoint.extra_body={"api_key": "PASSW0RD"}',
    "--endpoint.extra_body.api_key=PASSW0RD",
    "  password: PASSW0RD",
]
HARMLESS = [
    "http://localhost:8000/v1",
    "https://host/a@b/c",
    "https://host/v1?model=a&max_tokens=5",
    "model.api_key_env=OPENAI_API_KEY",
    "api_key_env: OPENAI_API_KEY",
    "api_key: null",
    "--model.rollout.max_new_tokens=1024",
    "token_accuracy: 0.9",
    "the letter is sk- and hf_small",
    "someone@example.org",
    "",
]


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_found_and_hidden(text: str) -> None:
    kind = find_credential(text)
    assert kind is not None and "PASSW0RD" not in kind
    assert "PASSW0RD" not in hide_credentials(text) and "W0RD" not in hide_credentials(text)
    assert find_credential(hide_credentials(text)) in (None, kind)


@pytest.mark.parametrize("text", HARMLESS)
def test_harmless_text_is_left_as_it_is(text: str) -> None:
    assert find_credential(text) is None
    assert hide_credentials(text) == text


def test_known_secrets_are_hidden_wherever_they_stand() -> None:
    assert hide_credentials("no key 12345 is known", ["12345", ""]) == "no key *** is known"
