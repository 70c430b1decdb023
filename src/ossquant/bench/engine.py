"""Which engine answers at an endpoint, and what it tells of its models and of itself."""

import json
from collections.abc import Mapping
from typing import Any

from ossquant.bench.client import Client
from ossquant.errors import EndpointError, plain

_OWNERS = {"vllm": "vllm", "llamacpp": "llama.cpp", "library": "ollama", "sglang": "sglang"}
_PATHS = {"/load_model": "transformers", "/get_server_info": "sglang", "/tokenizer_info": "vllm"}


async def served_models(client: Client, *, named: bool) -> dict[str, str]:
    """The models that are served, with who owns them; empty if the server keeps no list."""
    base = client.endpoint.base
    status, headers, page = await client.get(f"{base}/models")
    if status in (401, 403):
        raise EndpointError(f"{base} refuses the key: HTTP {status}", hint="--api-key-env NAME gives it one")
    if status >= 500 and not named:  # transformers serve fails to list models where none was ever downloaded
        raise EndpointError(f"{base} lists no models: HTTP {status}", hint="is it ready? else say --model")
    if "html" in headers.get("Content-Type", "") or page.lstrip()[:1] == b"<":
        raise EndpointError(f"{base} answers with a page of HTML", hint="the URL is another server's")
    body = _json(page) if status == 200 else None
    rows = body.get("data") if isinstance(body, dict) else None
    rows = [row for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    sound = [row for row in rows if isinstance(row.get("id"), str) and row["id"] == plain(row["id"])]
    return {row["id"]: str(row.get("owned_by", "")) for row in sound}


async def find_engine(client: Client, listed: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
    """The server's kind, and what it tells of itself; 'unknown' if it does not."""
    root = client.endpoint.root
    for owner in listed.values():
        if owner in _OWNERS:
            return _OWNERS[owner], await _details(client, _OWNERS[owner])
    status, _, page = await client.get(f"{root}/openapi.json")
    body = _json(page) if status == 200 else None
    paths = body.get("paths") if isinstance(body, dict) else None
    for path, engine in _PATHS.items():
        if isinstance(paths, dict) and path in paths:
            return engine, await _details(client, engine)
    return "unknown", {}


# where an engine tells its version and flags, and which of them are kept
_DETAILS = {
    "vllm": ("/version", ("version",)),
    "ollama": ("/api/version", ("version",)),
    "llama.cpp": ("/props", ("build_info", "total_slots", "model_alias", "n_ctx")),
}


async def _details(client: Client, engine: str) -> dict[str, Any]:
    if engine not in _DETAILS:
        return {}
    path, keys = _DETAILS[engine]
    status, _, page = await client.get(f"{client.endpoint.root}{path}")
    body = _json(page) if status == 200 else None
    if not isinstance(body, dict):
        return {}
    settings = body.get("default_generation_settings")
    body = {**settings, **body} if isinstance(settings, dict) else body
    return {key: body[key] for key in keys if isinstance(body.get(key), str | int)}


def _json(page: bytes) -> Any:
    try:
        return json.loads(page)
    except (ValueError, RecursionError):
        return None
