"""A checkpoint's dimensions and plan by its headers alone, local or on a hub: kilobytes, not gigabytes."""

import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from ossquant.checkpoint.header import Placed, parse_header, parse_json
from ossquant.checkpoint.reader import INDEX, SINGLE, is_hub_id, locate, open_checkpoint, parse_weight_map
from ossquant.errors import CheckpointError, UsageError
from ossquant.plan import Plan, read_plan
from ossquant.spec import ModelSpec

# Bounds for a hub that is slow or hostile, far above what gpt-oss has: 15 files, and less than 0.25 MB read of the 20b
MAX_BYTES = 16 * 2**20
MAX_FILES = 1000
PATIENCE = 6  # a file may take this many times HF_HUB_DOWNLOAD_TIMEOUT, which bounds every wait for bytes
FIRST_BYTES = 64 * 2**10  # most headers are shorter, and then one request is enough

_FETCH = "fetch it, then give the folder"
_NETWORK = "check the network, HF_ENDPOINT and proxies; or give a folder, 20b or 120b"


def read_headers(source: str) -> tuple[ModelSpec, Plan]:
    """Read what a folder or a hub id stores; offline what the hub's cache has. Raises UsageError, CheckpointError."""
    if not is_hub_id(source) or Path(source).exists():
        return _read_local(source)
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        return _read_remote(source)
    except OfflineModeIsEnabled:
        return _read_local(source)


def _read_local(source: str) -> tuple[ModelSpec, Plan]:
    with open_checkpoint(source) as checkpoint:
        return checkpoint.spec, checkpoint.plan


def _read_remote(source: str) -> tuple[ModelSpec, Plan]:
    repo = _Repo(source)
    spec = ModelSpec.from_config(parse_json(repo.whole("config.json"), "config.json"))
    index = repo.whole(INDEX, missing_is_error=False)
    weight_map = parse_weight_map(parse_json(index, INDEX)) if index else None
    shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    if len(shards) > MAX_FILES:
        raise CheckpointError(f"{INDEX}: names {len(shards)} files", hint="do not trust this checkpoint")
    locations = locate(Path(source), shards, repo.header, weight_map)
    return spec, read_plan(spec, {name: location.placed.tensor for name, location in locations.items()})


@dataclass(frozen=True)
class _Part:
    """Bytes of a file, and the size of all of it; None if the hub does not say."""

    data: bytes
    file_size: int | None


class _Repo:
    """A repository on the hub, read by byte ranges."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id

    def whole(self, name: str, missing_is_error: bool = True) -> bytes:
        """A small file; empty if it may be missing, and is."""
        part = self._get(name, 0, MAX_BYTES, missing_is_error)
        if part and part.file_size and part.file_size > MAX_BYTES:
            raise CheckpointError(f"{name}: larger than any such file is", hint="do not trust this checkpoint")
        return part.data if part else b""

    def header(self, name: str) -> list[Placed]:
        """What a safetensors file holds."""
        first = self._get(name, 0, FIRST_BYTES)
        if first is None or first.file_size is None:
            raise CheckpointError(f"{self.repo_id}: {name} cannot be read in parts", hint=_FETCH)

        def read(begin: int, count: int) -> bytes:
            if begin + count <= len(first.data) or len(first.data) == first.file_size:
                return first.data[begin : begin + count]
            if count > MAX_BYTES:
                raise CheckpointError(f"{name}: header of {count} bytes", hint="do not trust this checkpoint")
            part = self._get(name, begin, count)
            return part.data if part else b""

        return parse_header(read, first.file_size, name)

    def _get(self, name: str, begin: int, count: int, missing_is_error: bool = True) -> _Part | None:
        from huggingface_hub import constants, hf_hub_url

        http, session, timeout = _http(), _session(), constants.HF_HUB_DOWNLOAD_TIMEOUT
        headers = _headers() | {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
        try:
            with session.stream("GET", hf_hub_url(self.repo_id, name), headers=headers, timeout=timeout,
                                follow_redirects=True) as response:  # fmt: skip
                if response.status_code == 404 and not missing_is_error:
                    return None
                response.raise_for_status()
                return self._read(response, name, count, time.monotonic() + PATIENCE * timeout)
        except http.HTTPStatusError as error:
            raise UsageError(
                f"the hub answers {error.response.status_code} for {self.repo_id}/{name}",
                hint="check the id; private and gated models need HF_TOKEN",
            ) from error
        except (http.HTTPError, http.InvalidURL) as error:
            raise UsageError(
                f"no folder '{self.repo_id}', and the hub does not give {name}: {type(error).__name__}",
                hint=_NETWORK,
            ) from error

    def _read(self, response: Any, name: str, count: int, deadline: float) -> _Part:
        """Read an answer; it must be neither packed nor longer than count bytes, whatever it says of itself."""
        headers = response.headers
        if headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(f"{self.repo_id}: the hub sends {name} packed", hint=_FETCH)
        length, data = headers.get("content-length", ""), bytearray()
        if length.isdigit() and int(length) > count:
            self._refuse_whole(name)
        for chunk in response.iter_raw():
            data += chunk
            if len(data) > count:
                self._refuse_whole(name)
            if time.monotonic() > deadline:
                raise UsageError(f"the hub gives {self.repo_id}/{name} too slowly", hint=_NETWORK)
        size = headers.get("content-range", "").rpartition("/")[2] if response.status_code == 206 else str(len(data))
        return _Part(bytes(data), int(size) if size.isdigit() else None)

    def _refuse_whole(self, name: str) -> NoReturn:
        raise CheckpointError(f"{self.repo_id}: the hub sends more of {name} than was asked for", hint=_FETCH)


def _http() -> ModuleType:
    """What the hub speaks through: httpx for version 1, httpx2 for 2; both have the names used here."""
    from huggingface_hub.errors import HfHubHTTPError

    return import_module(HfHubHTTPError.__bases__[0].__module__.partition(".")[0])


def _session() -> Any:
    from huggingface_hub import get_session

    try:
        return get_session()
    except (ValueError, ImportError, OSError, _http().InvalidURL) as error:  # proxies and certificates it cannot use
        raise UsageError(f"the hub cannot be asked: {error}", hint=_NETWORK) from error


def _headers() -> dict[str, str]:
    """Who asks; the hub's own headers would say what is installed too, and cost a request of their own."""
    from huggingface_hub import constants, get_token

    token = "" if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token() or ""
    if not (token.isascii() and token.isprintable()):
        raise UsageError("HF_TOKEN holds characters that no token has", hint="set it anew, or unset it")
    return {"User-Agent": "ossquant"} | ({"Authorization": f"Bearer {token}"} if token else {})
