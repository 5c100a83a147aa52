"""Secrets in addresses: sweep files are refused with them, and whatever is written or shown is without them."""

import re

ADVICE = (
    "a sweep file is copied to the cluster, the run directory and W&B: leave secrets out, and give them to the "
    "machines as environment variables (AWS_*, WANDB_API_KEY) or instance roles"
)
HIDDEN = "***"
# user:password@ (a password may hold / and @, a port is a number), and for web servers, where it can be a token, user@.
_USER = re.compile(r"(://)[^/@\s:\[]*:(?!\d+/)\S*(?=@)|(\bhttps?://)[^/\s?#]+(?=@)", re.IGNORECASE)
# A value ends before what ends a sentence.
_QUERY = re.compile(r"([?&;#]([^=&;?#\s]+)=)((?:[^&;#\s'\"<>()[\]{}]*[^&;#\s'\"<>()[\]{},.:])?)")
_NAME = re.compile(
    r"key|token|secret|passw|pwd|signature|credential|auth|^(.*[._-])?(sig|sas|jwt|pass)$", re.IGNORECASE
)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*(://|::)\S+", re.IGNORECASE)


def secret_in_url(url: str) -> str | None:
    """Which part of `url` holds a secret, in words that do not repeat it; None where there is none."""
    if _USER.search(url):
        return "the address has a password or token before its @"
    named = next((name for _, name, value in _QUERY.findall(url) if value and names_secret(name)), None)
    return None if named is None else f"the address has a secret in its query ({named}=...)"


def names_secret(key: str) -> bool:
    """Whether something called `key` is likely to be a secret."""
    return bool(_NAME.search(key))


def hide_secrets(text: str) -> str:
    """The text with what is secret in its addresses replaced by `***`: what stands before an @, and the values of a
    query whose names say so. An address without secrets stays as it is."""
    return _ADDRESS.sub(lambda found: _hidden(found[0]), text) if ":" in text else text


def _hidden(address: str) -> str:
    address = _USER.sub(lambda found: f"{found[1] or found[2]}{HIDDEN}", address)
    return _QUERY.sub(lambda found: found[1] + (HIDDEN if names_secret(found[2]) else found[3]), address)
