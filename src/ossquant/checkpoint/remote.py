"""A checkpoint's dimensions and plan by its headers alone, local or on a hub: kilobytes, not gigabytes."""

from importlib import import_module
from pathlib import Path
from typing import Any

from ossquant.checkpoint.header import MAX_JSON_BYTES, parse_header, parse_json
from ossquant.checkpoint.reader import INDEX, SINGLE, is_hub_id, join_headers, open_checkpoint, parse_weight_map
from ossquant.errors import CheckpointError, UsageError
from ossquant.plan import Plan, read_plan
from ossquant.spec import ModelSpec

TIMEOUT = 20.0  # seconds


def read_headers(source: str) -> tuple[ModelSpec, Plan]:
    """Read what a folder or a hub id stores. Raises UsageError, CheckpointError."""
    if Path(source).exists() or not is_hub_id(source):
        with open_checkpoint(source) as checkpoint:
            return checkpoint.spec, checkpoint.plan
    repo = _Repo(source)
    spec = ModelSpec.from_config(repo.json("config.json"))
    weight_map = parse_weight_map(repo.json(INDEX)) if repo.has(INDEX) else None
    shards = sorted(set(weight_map.values())) if weight_map else [SINGLE]
    headers = {shard: parse_header(*repo.ranges(shard), shard) for shard in shards}
    locations = join_headers(Path(source), headers, weight_map)
    return spec, read_plan(spec, {name: location.placed.tensor for name, location in locations.items()})


class _Repo:
    """A repository on the hub, read by byte ranges."""

    def __init__(self, repo_id: str) -> None:
        self.repo_id = repo_id

    def has(self, name: str) -> bool:
        """Whether the repository holds a file."""
        return self._get(name, 0, 1, missing_is_error=False) is not None

    def json(self, name: str) -> dict[str, Any]:
        """A small JSON file, checked as an untrusted one is."""
        return parse_json(self._bytes(name, 0, MAX_JSON_BYTES), name)

    def ranges(self, name: str) -> tuple[Any, int]:
        """A function that reads bytes of a file, and the file's size."""
        response = self._get(name, 0, 1)
        size = response.headers.get("content-range", "").rpartition("/")[2] if response else ""
        if not size.isdigit():
            raise CheckpointError(
                f"{self.repo_id}: {name} cannot be read in parts", hint="fetch it, then give the folder"
            )
        return lambda begin, count: self._bytes(name, begin, count), int(size)

    def _bytes(self, name: str, begin: int, count: int) -> bytes:
        response = self._get(name, begin, count)
        return response.content if response else b""

    def _get(self, name: str, begin: int, count: int, missing_is_error: bool = True) -> Any:
        from huggingface_hub import get_session, hf_hub_url

        session = get_session()
        # hub 1 speaks through httpx, hub 2 through httpx2; both have these names
        http = import_module(type(session).__module__.partition(".")[0])
        headers = _headers() | {"Range": f"bytes={begin}-{begin + count - 1}", "Accept-Encoding": "identity"}
        try:
            with session.stream("GET", hf_hub_url(self.repo_id, name), headers=headers, timeout=TIMEOUT,
                                follow_redirects=True) as response:  # fmt: skip
                if response.status_code == 404 and not missing_is_error:
                    return None
                response.raise_for_status()
                if int(response.headers.get("content-length", 0)) > count:
                    raise CheckpointError(
                        f"{self.repo_id}: the hub sends {name} whole", hint="fetch it, then give the folder"
                    )
                response.read()
                return response
        except http.HTTPStatusError as error:
            raise UsageError(
                f"the hub answers {error.response.status_code} for {self.repo_id}/{name}",
                hint="check the id; private and gated models need HF_TOKEN",
            ) from error
        except http.HTTPError as error:
            raise UsageError(
                f"no folder '{self.repo_id}', and the hub cannot be reached: {type(error).__name__}",
                hint="give a folder, or 20b or 120b",
            ) from error


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    return dict(build_hf_headers())
