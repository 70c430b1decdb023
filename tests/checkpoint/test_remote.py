"""Checkpoints read by their headers: on a hub, which is a real HTTP server here, and in folders."""

import dataclasses
import json
import os
import shlex
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conftest import ROOT, run_cli
from ossquant.checkpoint.header import build_header
from ossquant.checkpoint.reader import INDEX, SINGLE, open_checkpoint
from ossquant.checkpoint.remote import MAX_BYTES, read_headers
from ossquant.errors import CheckpointError, UsageError
from ossquant.scheme import ITEMSIZE, StoredTensor
from ossquant.spec import ModelSpec

REPO = "someone/gpt-oss-mine"
TOKEN = "hf_dummyTokenThatMustNotBeSeen"  # noqa: S105  made up
GOLDEN = json.loads((ROOT / "tests/golden/gpt-oss-20b.json").read_text())


class Handler(BaseHTTPRequestHandler):
    """Serves /{repo}/resolve/main/FILE as the hub does, by ranges."""

    protocol_version = "HTTP/1.1"
    server: "Hub"

    def do_GET(self) -> None:
        hub, name = self.server, self.path.partition("?")[0].removeprefix(f"/{REPO}/resolve/main/")
        hub.asked.append((name, self.headers.get("Range", ""), self.headers.get("Authorization")))
        try:
            if name in hub.instead:
                hub.instead[name](self)
            else:
                self.give_part(hub.folder / name)
        except (BrokenPipeError, ConnectionResetError):  # the client has heard enough
            self.close_connection = True

    def give_part(self, path: Path) -> None:
        if not path.is_file():
            self.give(b"", status=404)
            return
        size = path.stat().st_size
        begin, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
        end = min(int(last) + 1, size)
        with path.open("rb") as file:
            file.seek(int(begin))
            data = file.read(end - int(begin))
        self.give(data, status=206, **{"Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    def give(self, data: bytes, status: int = 200, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(data) if length is None else length)} | headers).items():
            self.send_header(key, value)
        self.end_headers()
        self.send(data)

    def send(self, data: bytes) -> None:
        self.wfile.write(data)
        self.server.sent += len(data)

    def log_message(self, *_: Any) -> None:
        pass


class Hub(ThreadingHTTPServer):
    """A hub with one repository; instead answers some of its files otherwise."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.instead: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[tuple[str, str, str | None]] = []
        self.sent = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def fit(self, home: Path, *options: str, host: str = "127.0.0.1", **env: str) -> subprocess.CompletedProcess[str]:
        """Run `ossquant fit` on the repository; a wait for bytes may take a second."""
        clean = {key: value for key, value in os.environ.items() if "proxy" not in key.lower() and key[:3] != "HF_"}
        settings = {"HF_ENDPOINT": f"http://{host}:{self.server_port}", "HF_HOME": str(home), "HF_TOKEN": TOKEN,
                    "HF_HUB_DOWNLOAD_TIMEOUT": "1"}  # fmt: skip
        return run_cli(
            "fit", "--gpu", "4090", "--model", REPO, *options, env=clean | settings | env, cwd=home, timeout=60
        )


@pytest.fixture
def hubs(tmp_path: Path) -> Iterator[Callable[[Path], Hub]]:
    """Starts hubs, and stops them."""
    started: list[Hub] = []

    def start(folder: Path) -> Hub:
        started.append(Hub(folder))
        return started[-1]

    yield start
    for hub in started:
        hub.shutdown()
        hub.server_close()


@pytest.fixture
def hub(hubs: Callable[[Path], Hub], trained: Path, tmp_path: Path) -> Hub:
    """A hub with a copy of the trained model, to be damaged."""
    return hubs(Path(shutil.copytree(trained, tmp_path / "served")))


def write_full_size(folder: Path, shards: int) -> Path:
    """The 20b with its published tensors and no bytes: files that are holes but for their headers."""
    folder.mkdir()
    layers = {f"model.layers.{n}.{name}": v for n in range(GOLDEN["layers"]) for name, v in GOLDEN["layer"].items()}
    tensors = [StoredTensor(name, dtype, tuple(shape)) for name, (dtype, shape) in (GOLDEN["model"] | layers).items()]
    tensors.sort(key=lambda tensor: -ITEMSIZE[tensor.dtype])
    weight_map = {}
    for number in range(shards):
        name = SINGLE if shards == 1 else f"model-{number:05}-of-{shards:05}.safetensors"
        held = tensors[number::shards]
        header, placed = build_header(held, {"format": "pt"})
        with (folder / name).open("wb") as file:
            file.write(header)
            file.truncate(placed[-1].offset + placed[-1].tensor.nbytes)
        weight_map |= {tensor.name: name for tensor in held}
    if shards > 1:
        (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "gpt_oss"} | dataclasses.asdict(ModelSpec.published("20b"))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_only_headers_are_read(hubs: Callable[[Path], Hub], shards: int, tmp_path: Path) -> None:
    """Of a 20b's 13.8 GB less than a quarter of a megabyte is read, and its weights are exact to the byte."""
    hub = hubs(write_full_size(tmp_path / "served", shards))
    done = hub.fit(tmp_path, "--engine", "transformers", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    answer = json.loads(done.stdout)
    assert (answer["model"], answer["format"]) == (REPO, "mxfp4")
    assert answer["device_memory"]["weights"]["expected"] == GOLDEN["total_size"]
    assert REPO in answer["command"]
    assert hub.sent < 250_000
    assert sum(path.stat().st_size for path in hub.folder.iterdir()) > GOLDEN["total_size"]
    assert {token for _, _, token in hub.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in done.stdout


def test_a_header_longer_than_the_first_bytes(hubs: Callable[[Path], Hub], tmp_path: Path) -> None:
    """A long header is read to its end, in two requests."""
    folder = write_full_size(tmp_path / "served", 1)
    tensors = [*open_checkpoint(folder).stored.values()]
    header, _ = build_header(tensors, {"format": "pt", "note": "x" * 200_000})
    with (folder / SINGLE).open("r+b") as file:
        file.write(header)
        file.truncate(len(header) + GOLDEN["total_size"])
    hub = hubs(folder)
    assert hub.fit(tmp_path).returncode == 0
    assert [name for name, _, _ in hub.asked].count(SINGLE) == 2
    assert hub.sent < 400_000


@pytest.mark.parametrize("scheme", ["mxfp4", "hybrid", "nf4", "fp4", "bf16"])
def test_a_checkpoint_is_judged_as_it_is_stored(trained: Path, quantized: dict[str, Path], scheme: str) -> None:
    """A folder's spec and plan are those of its headers: every byte it stores, in the format it was made in."""
    folder = trained if scheme == "mxfp4" else quantized[scheme]
    done = run_cli("fit", "--gpu", "24GB", "--engine", "transformers", "--json", "--model", folder)
    answer = json.loads(done.stdout)
    with open_checkpoint(folder) as checkpoint:
        stored = sum(tensor.nbytes for tensor in checkpoint.stored.values())
    assert (answer["format"], answer["device_memory"]["weights"]["expected"]) == (scheme, stored)
    assert read_headers(str(folder))[1].nbytes == stored


def test_a_folder_of_the_same_name_is_taken(hub: Hub, trained: Path, tmp_path: Path) -> None:
    """Where owner/name is a folder, the hub is not asked."""
    shutil.copytree(trained, tmp_path / REPO)
    assert hub.fit(tmp_path).returncode == 0
    assert hub.asked == []


def test_offline_takes_what_the_cache_has(hub: Hub, trained: Path, tmp_path: Path) -> None:
    """With HF_HUB_OFFLINE nothing is asked: a cached snapshot is read, and without one the sentence says so."""
    done = hub.fit(tmp_path, HF_HUB_OFFLINE="1")
    assert_refused(done, 2, f"no folder '{REPO}'", f"hf download {REPO}")
    commit = "0" * 40
    cache = tmp_path / "hub" / f"models--{REPO.replace('/', '--')}"
    shutil.copytree(trained, cache / "snapshots" / commit)
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text(commit)
    assert hub.fit(tmp_path, HF_HUB_OFFLINE="1").returncode == 0
    assert hub.asked == []


def assert_refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One sentence and a hint, the code, and never the token."""
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    lines = done.stderr.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("  try: ")), done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert TOKEN not in done.stderr


@pytest.mark.parametrize("status", [401, 403, 404, 416, 429, 500, 503])
def test_a_status_is_said(hub: Hub, status: int, tmp_path: Path) -> None:
    """What the hub answers instead of a file ends with 2."""
    hub.instead["config.json"] = lambda handler: handler.give(b"no", status=status)
    assert_refused(hub.fit(tmp_path), 2, f"the hub answers {status} for {REPO}/config.json", "HF_TOKEN")


def test_a_missing_shard_is_said(hub: Hub, tmp_path: Path) -> None:
    """A file that the index names and the hub lacks."""
    (hub.folder / "model-00002-of-00002.safetensors").unlink()
    assert_refused(hub.fit(tmp_path), 2, "404", "model-00002-of-00002.safetensors")


def test_no_weights_are_said(hub: Hub, tmp_path: Path) -> None:
    """A repository without safetensors."""
    for path in (*hub.folder.glob("*.safetensors"), hub.folder / INDEX):
        path.unlink()
    assert_refused(hub.fit(tmp_path), 2, "404", SINGLE)


def test_a_small_file_may_come_whole(hub: Hub, tmp_path: Path) -> None:
    """A server without ranges will do where a file is as short as what was asked for."""
    for name in ("config.json", INDEX):
        hub.instead[name] = lambda handler, path=hub.folder / name: handler.give(path.read_bytes())
    assert hub.fit(tmp_path).returncode == 0


GIGABYTES = 13_800_000_000


@dataclass
class Endless:
    """Sends zeros until nobody listens: with a length, in chunks, or until it hangs up."""

    framing: str
    sent: int = field(default=0)

    def __call__(self, handler: Handler) -> None:
        headers = {"chunked": {"Transfer-Encoding": "chunked"}, "close": {"Connection": "close"}}.get(
            self.framing, {"Content-Length": str(GIGABYTES)}
        )
        handler.send_response(200)
        for key, value in headers.items():
            handler.send_header(key, value)
        handler.end_headers()
        block = bytes(2**16)
        chunk = b"10000\r\n" + block + b"\r\n" if self.framing == "chunked" else block
        while self.sent < 200_000_000:
            handler.wfile.write(chunk)
            self.sent += len(chunk)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_whole_file_is_refused(hub: Hub, name: str, framing: str, tmp_path: Path) -> None:
    """A server that ignores the range and sends 14 GB is hung up on, however it frames them."""
    sends = hub.instead[name] = Endless(framing)
    began = time.monotonic()
    assert_refused(hub.fit(tmp_path), 3, f"more of {name} than was asked for", "fetch it")
    assert time.monotonic() - began < 10
    # kernels on both sides hold some megabytes that nobody reads
    assert sends.sent < (MAX_BYTES if name == "config.json" and framing != "length" else 0) + 20_000_000


def test_a_packed_answer_is_refused(hub: Hub, tmp_path: Path) -> None:
    """What would unpack to more than it says is not unpacked."""
    hub.instead["config.json"] = lambda handler: handler.give(b"\x1f\x8b" + bytes(100), **{"Content-Encoding": "gzip"})
    assert_refused(hub.fit(tmp_path), 3, "packed")


def test_the_token_stays_with_the_hub(hubs: Callable[[Path], Hub], trained: Path, tmp_path: Path) -> None:
    """A redirect to another host is followed without the token; one on the same host keeps it."""
    elsewhere, home = hubs(trained), hubs(trained)
    shard = "model-00001-of-00002.safetensors"
    address = f"http://localhost:{elsewhere.server_port}/{REPO}/resolve/main/{shard}"
    home.instead[shard] = lambda handler: handler.give(b"", status=302, Location=address)
    other = f"/{REPO}/resolve/main/{INDEX}?again=1"
    home.instead[INDEX] = lambda handler: (
        handler.give_part(trained / INDEX) if "again" in handler.path else handler.give(b"", 307, Location=other)
    )
    done = home.fit(tmp_path)
    assert (done.returncode, TOKEN in done.stdout + done.stderr) == (0, False)
    assert {(name, token) for name, _, token in elsewhere.asked} == {(shard, None)}
    assert [token for name, _, token in home.asked if name == INDEX] == [f"Bearer {TOKEN}"] * 2


@pytest.mark.parametrize("target", ["/again", "file:///etc/passwd", "http://[", "http://127.0.0.1:1/x"])
def test_a_redirect_to_nowhere(hub: Hub, target: str, tmp_path: Path) -> None:
    """Redirects in a circle, to a file, or to where nothing listens."""
    where = f"/{REPO}/resolve/main/config.json" if target == "/again" else target
    hub.instead["config.json"] = lambda handler: handler.give(b"", status=302, Location=where)
    assert_refused(hub.fit(tmp_path), 2, "the hub does not give config.json")


def shorten(hub: Hub) -> str:
    os.truncate(hub.folder / "model-00002-of-00002.safetensors", 500_000)
    return "model-00002-of-00002.safetensors: 500000 of "


def cut_header(hub: Hub) -> str:
    os.truncate(hub.folder / "model-00001-of-00002.safetensors", 100)
    return "in a file of 100"


def cut_to_four(hub: Hub) -> str:
    os.truncate(hub.folder / "model-00001-of-00002.safetensors", 4)
    return "in a file of 4"


def _lie(hub: Hub, length: int) -> None:
    with (hub.folder / "model-00001-of-00002.safetensors").open("r+b") as file:
        file.write(length.to_bytes(8, "little"))


def lie_short(hub: Hub) -> str:
    _lie(hub, 10)
    return "not JSON"


def lie_long(hub: Hub) -> str:
    _lie(hub, 2**63)
    return f"header of {2**63} bytes"


def lie_large(hub: Hub) -> str:
    os.truncate(hub.folder / "model-00001-of-00002.safetensors", 2**33)
    _lie(hub, 90_000_000)
    return "header of 90000000 bytes"


def escape(hub: Hub) -> str:
    _index(hub, {"lm_head.weight": "../../../../etc/passwd"})
    return "'../../../../etc/passwd' is not a file name beside it"


def elsewhere(hub: Hub) -> str:
    _index(hub, {"lm_head.weight": "http://example.org/model.safetensors"})
    return "is not a file name beside it"


def thousands(hub: Hub) -> str:
    _index(hub, {f"t{n}": f"model-{n}.safetensors" for n in range(5000)})
    return "names 5000 files"


def _index(hub: Hub, weight_map: dict[str, str]) -> None:
    (hub.folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def other_index(hub: Hub) -> str:
    index = json.loads((hub.folder / INDEX).read_text())
    index["weight_map"].pop("lm_head.weight")
    _index(hub, index["weight_map"])
    return "does not name 'lm_head.weight'"


def huge_config(hub: Hub) -> str:
    with (hub.folder / "config.json").open("ab") as file:
        file.truncate(10**9)
    return "config.json: larger than any such file is"


def deep_config(hub: Hub) -> str:
    (hub.folder / "config.json").write_text('{"a":' * 100_000)
    return "config.json: not JSON: nested too deep"


def web_page(hub: Hub) -> str:
    (hub.folder / "config.json").write_text("<html>Sign in</html>")
    return "config.json: not JSON"


def other_model(hub: Hub) -> str:
    (hub.folder / "config.json").write_text('{"model_type": "llama"}')
    return "model_type is 'llama'"


def many_layers(hub: Hub) -> str:
    config = json.loads((hub.folder / "config.json").read_text())
    del config["layer_types"]
    (hub.folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4096}))
    return "model.layers."


@pytest.mark.parametrize(
    "damage",
    [shorten, cut_header, cut_to_four, lie_short, lie_long, lie_large, escape, elsewhere, thousands, other_index,
     huge_config, deep_config, web_page, other_model, many_layers],
    ids=lambda damage: damage.__name__,
)  # fmt: skip
def test_what_a_hub_holds_is_checked(hub: Hub, damage: Callable[[Hub], str], tmp_path: Path) -> None:
    """A hostile or damaged repository ends with 3 after few bytes; the sentence says which file and what."""
    words = damage(hub)
    assert_refused(hub.fit(tmp_path), 3, words)
    assert hub.sent <= MAX_BYTES + 200_000
    assert not any("passwd" in name for name, _, _ in hub.asked)


@pytest.mark.parametrize("damage", [shorten, lie_long, escape, other_index, deep_config], ids=lambda d: d.__name__)
def test_what_a_folder_holds_is_checked(hub: Hub, damage: Callable[[Hub], str]) -> None:
    """The same in a folder."""
    words = damage(hub)
    assert_refused(run_cli("fit", "--gpu", "4090", "--model", hub.folder), 3, words)


def test_too_many_tensors_over_all_shards(hub: Hub, tmp_path: Path) -> None:
    """Headers that are sound one by one end at 80,000 tensors in all; the files after those are not asked for."""
    names = [f"model-{number}.safetensors" for number in range(4)]
    for number, name in enumerate(names):
        header, _ = build_header([StoredTensor(f"{number}.{i}", "U8", (0,)) for i in range(45_000)], {})
        (hub.folder / name).write_bytes(header)
    _index(hub, {f"{number}.0": name for number, name in enumerate(names)})
    assert_refused(hub.fit(tmp_path), 3, "model-1.safetensors: more tensors than any model has")
    assert {name for name, _, _ in hub.asked if name in names} == set(names[:2])


def hang_up(handler: Handler) -> None:
    handler.give(b'{"model', length=1000)
    handler.close_connection = True


def babble(handler: Handler) -> None:
    handler.wfile.write(b"SSH-2.0-OpenSSH_9.6\r\n")
    handler.close_connection = True


def sleep(_: Handler) -> None:
    time.sleep(3)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(hang_up, "RemoteProtocolError"), (babble, "RemoteProtocolError"), (sleep, "ReadTimeout")],
    ids=["hangs up", "babbles", "sleeps"],
)
def test_a_broken_answer(hub: Hub, answer: Callable[[Handler], None], words: str, tmp_path: Path) -> None:
    """A server that hangs up, speaks no HTTP or says nothing."""
    hub.instead["config.json"] = answer
    assert_refused(hub.fit(tmp_path), 2, words, f"no folder '{REPO}'")


def test_a_trickle_ends(hub: Hub, tmp_path: Path) -> None:
    """A server that sends a byte now and then is not listened to for ever."""

    def trickle(handler: Handler) -> None:
        handler.give(b"", length=1000)
        for _ in range(200):
            handler.send(b" ")
            time.sleep(0.2)

    hub.instead["config.json"] = trickle
    began = time.monotonic()
    assert_refused(hub.fit(tmp_path), 2, "too slowly")
    assert time.monotonic() - began < 15


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ({"HF_ENDPOINT": "http://127.0.0.1:1"}, "ConnectError"),
        ({"HF_ENDPOINT": "http://nowhere.invalid"}, "ConnectError"),
        ({"HF_ENDPOINT": "nowhere"}, "UnsupportedProtocol"),
        ({"HF_ENDPOINT": "http://exa$mple..é"}, "InvalidURL"),
        ({"HTTP_PROXY": "gopher://127.0.0.1:1"}, "the hub cannot be asked"),
        ({"HF_TOKEN": "hf_dämmy"}, "HF_TOKEN holds characters that no token has"),
    ],
    ids=lambda value: "".join(value.values()) if isinstance(value, dict) else "",
)
def test_no_hub(hub: Hub, setting: dict[str, str], words: str, tmp_path: Path) -> None:
    """Nothing listens, or the settings cannot be used."""
    assert_refused(hub.fit(tmp_path, **setting), 2, words)
    assert hub.asked == []


@pytest.mark.parametrize("source", ["", " ", "a\0b", "x" * 5000, "../..", "owner/", "a/b/c", "~", "gpt-oss-20b"])
def test_what_is_neither_folder_nor_hub_id(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd names are refused without the network."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises((UsageError, CheckpointError)):
        read_headers(source)


@pytest.mark.parametrize(("experts", "attention"), [("bf16", "nf4"), ("mxfp4", "fp4"), ("fp4", "nf4")])
def test_a_mixed_checkpoint_is_judged(trained: Path, experts: str, attention: str, tmp_path: Path) -> None:
    """What a recipe of one's own made is judged by its bytes, though no built-in format is like it."""
    recipe = f'name = "mine"\nwhy = "to test"\n[experts]\nformat = "{experts}"\n[attention]\nformat = "{attention}"\n'
    (tmp_path / "mine.toml").write_text(recipe)
    assert run_cli("quantize", trained, tmp_path / "out", "--recipe", tmp_path / "mine.toml").returncode == 0
    done = run_cli("fit", "--gpu", "24GB", "--engine", "transformers", "--json", "--model", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    stored = sum(tensor.nbytes for tensor in open_checkpoint(tmp_path / "out").stored.values())
    assert json.loads(done.stdout)["device_memory"]["weights"]["expected"] == stored


@pytest.mark.parametrize("name", ["a[/b]c", "[red]x", "it's mine; true", ":smile:", "new\nline"])
def test_odd_folder_names(trained: Path, name: str, tmp_path: Path) -> None:
    """A folder's name is neither markup nor a command."""
    shutil.copytree(trained, tmp_path / name)
    for options in ([], ["--engine", "transformers"]):
        done = run_cli("fit", "4090", "--model", f"./{name}", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert name.isprintable() is False or name in done.stdout or shlex.quote(f"./{name}") in done.stdout
