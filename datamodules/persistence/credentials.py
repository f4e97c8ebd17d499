"""Find passwords and keys in text before anything is written, and hide them in messages.

A password in a URL or a key in a setting would be written to config.yaml, W&B, logs and journals. So commands refuse
such a setting at once. The secret must be in an environment variable; the setting is the name of this variable.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

HIDDEN = "***"

# scheme://user:password@host and scheme://token@host. An "@" after the first "/", "?" or "#" belongs to the path.
_USER_INFO = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*://)[^\s/?#@'\"]*(?:@[^\s/?#@'\"]*)*@")
# ?api_key=…: some servers accept a key in the query. The signature of a signed URL is a key for some hours.
_QUERY_KEY = re.compile(
    r"([?&](?:[A-Za-z\-]*signature|sig|api[_-]?key|key|[a-z_\-]*token|password|secret)=)[^\s&#'\"]+", re.IGNORECASE
)
# The documented forms of keys: OpenAI and Anthropic, Hugging Face, AWS, Google, GitHub, and an authorization header.
_KEY_FORMS = re.compile(
    r"\bsk-[A-Za-z0-9_\-]{12,}|\bhf_[A-Za-z0-9]{16,}|\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[A-Za-z0-9_\-]{30,}"
    r"|\bgh[pousr]_[A-Za-z0-9]{30,}|\bBearer\s+[A-Za-z0-9._\-]{8,}"
)
# A field whose name says that it is secret: {"api_key": "…"}, password: …, --endpoint.extra_body.api_key=…
_SECRET_FIELD = re.compile(
    r"(?<![A-Za-z0-9_])((?:x[_-])?api[_-]?key|authorization|passw(?:or)?d|access[_-]token|auth[_-]token|secret"
    r"|client[_-]secret)([\"']?\s*[:=]\s*[\"']?)(?!null\b|none\b|\*\*\*)([^\s\"',}{]+)",
    re.IGNORECASE,
)


def find_credential(text: str) -> str | None:
    """The kind of the first credential in `text`, in words that do not repeat it; None if there is none."""
    if _USER_INFO.search(text):
        return "a URL with a user name or password"
    if _QUERY_KEY.search(text):
        return "a URL with a key in its query"
    if _KEY_FORMS.search(text):
        return "a text of the form of an API key"
    if found := _SECRET_FIELD.search(text):
        return f"a value for {found[1]!r}"
    return None


def hide_credentials(text: str, secrets: Iterable[str] = ()) -> str:
    """`text` with *** in place of every credential that `find_credential` finds and of every known secret."""
    for secret in secrets:
        if secret:  # replacing "" would put *** between all characters
            text = text.replace(secret, HIDDEN)
    text = _USER_INFO.sub(rf"\1{HIDDEN}@", text)
    text = _QUERY_KEY.sub(rf"\1{HIDDEN}", text)
    text = _KEY_FORMS.sub(HIDDEN, text)
    return _SECRET_FIELD.sub(rf"\1\2{HIDDEN}", text)
