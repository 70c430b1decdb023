"""Endpoint: the URL of an OpenAI-compatible server, and what of it may be said aloud."""

import os
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from ossquant.errors import UsageError

_LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Endpoint:
    """base is the URL up to and with /v1; the key stands in no text of it."""

    base: str
    api_key: str | None = field(default=None, repr=False)

    @property
    def root(self) -> str:
        """The URL without /v1."""
        return self.base.removesuffix("/v1")

    @property
    def is_local(self) -> bool:
        """Whether the server runs on this machine, by its name."""
        return urlsplit(self.base).hostname in _LOOPBACK

    @property
    def port(self) -> int:
        """Where it listens."""
        parts = urlsplit(self.base)
        return parts.port or {"http": 80, "https": 443}[parts.scheme]

    @property
    def headers(self) -> dict[str, str]:
        """What every request says."""
        key = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        return {"Content-Type": "application/json", "Accept-Encoding": "identity", **key}


def is_url(target: str) -> bool:
    """Whether a target is meant as a URL."""
    return "://" in target


def find_endpoint(url: str, api_key_env: str | None = None) -> Endpoint:
    """Take http://HOST:PORT, with or without /v1; the key from an environment variable, and from nowhere else.

    Raises UsageError for what is no such URL, and for a variable that is not set.
    """
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        known = False
    if not known:
        raise UsageError(f"'{url}' is no URL of a server", hint="write it like http://127.0.0.1:8000")
    if parts.username or parts.password:
        raise UsageError("a URL with a password in it would stand in the results", hint="use --api-key-env NAME")
    if parts.query or parts.fragment:
        raise UsageError(f"'{url}' has a query", hint="write it like http://127.0.0.1:8000")
    path = re.sub(r"(/v1)?(/chat/completions)?/*$", "", parts.path.rstrip("/"))
    return Endpoint(f"{parts.scheme}://{parts.netloc}{path}/v1", _key(api_key_env))


def _key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name, "").strip()
    if not key or not key.isprintable():
        raise UsageError(f"the environment variable {name} holds no key", hint=f"export {name}=…")
    return key
