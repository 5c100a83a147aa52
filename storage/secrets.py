"""What must never be written into a sweep file: it is copied to the cluster, the run directory and W&B."""

import re

ADVICE = (
    "a sweep file is copied to the cluster, the run directory and W&B: leave secrets out, and give them to the "
    "machines as environment variables (AWS_*, WANDB_API_KEY) or instance roles"
)
# user:password@, and for addresses of web servers, where it can be a token, also user@.
_USER = re.compile(r"://[^/@\s]*:[^/@\s]*@|\bhttps?://[^/@\s]+@", re.IGNORECASE)
_QUERY = re.compile(r"[?&;#]([^=&;\s]+)=")
_NAME = re.compile(r"key|token|secret|passw|pwd|signature|credential|auth|^sig$", re.IGNORECASE)


def secret_in_url(url: str) -> str | None:
    """Which part of `url` holds a secret, in words that do not repeat it; None where there is none."""
    if _USER.search(url):
        return "the address has a password or token before its @"
    named = next((name for name in _QUERY.findall(url) if names_secret(name)), None)
    return None if named is None else f"the address has a secret in its query ({named}=...)"


def names_secret(key: str) -> bool:
    """Whether something called `key` is likely to be a secret."""
    return bool(_NAME.search(key))
