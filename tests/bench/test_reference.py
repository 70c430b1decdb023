import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from conftest import killed
from ossquant.bench.reference import MANIFEST, STATES, Reference, Request, load_reference, save_reference
from ossquant.bench.text import Text
from ossquant.errors import CheckpointError, UsageError

VOCAB, HIDDEN = 640, 192
REQUEST = Request("c" * 64, "t" * 64, "bfloat16", "conversations", "f" * 64, 48, 256, 1.0, 0, "low", 0)


def reference() -> Reference:
    """A reference of three texts, two of them answered."""
    generator = torch.Generator().manual_seed(0)
    texts = (Text((1, 2, 3, 4, 5), 2, True), Text((9, 639), 1), Text(tuple(range(10)), 4, True))
    hidden = torch.randn(sum(text.scored for text in texts), HIDDEN, generator=generator).bfloat16()
    return Reference(REQUEST, "gpt-oss", "cpu", (615,), texts, hidden)


def load(folder: Path, request: Request = REQUEST) -> Reference | None:
    return load_reference(folder, request, VOCAB, HIDDEN)


def test_a_reference_comes_back(tmp_path: Path) -> None:
    """What is kept comes back bit for bit, its scored tokens one behind the other; nothing else is left behind."""
    save_reference(tmp_path / "kept", reference())
    found = load(tmp_path / "kept")
    assert found is not None
    assert (found.texts, found.stops, found.request) == (reference().texts, (615,), REQUEST)
    assert torch.equal(found.hidden, reference().hidden)
    assert found.scored.tolist() == [3, 4, 5, 639, 4, 5, 6, 7, 8, 9]
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_nothing_is_nothing(tmp_path: Path) -> None:
    """A folder that is not there, or is empty, is no reference yet, and an empty one is filled."""
    assert load(tmp_path / "nowhere") is None
    (tmp_path / "empty").mkdir()
    assert load(tmp_path / "empty") is None
    save_reference(tmp_path / "empty", reference())
    assert load(tmp_path / "empty") is not None


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"checkpoint": "d" * 64}, "reference run of another checkpoint"),
        ({"tokenizer": "d" * 64}, "reference run of another tokenizer"),
        ({"temperature": 0.0}, "made with temperature 1.0, not 0.0"),
        ({"dtype": "float32"}, "made with dtype bfloat16, not float32"),
        ({"text": "0" * 64}, "made with text fff"),
    ],
)
def test_another_reference_is_refused(other: dict[str, Any], told: str, tmp_path: Path) -> None:
    """A reference of another checkpoint, or made with other settings, is refused and says what differs."""
    save_reference(tmp_path / "kept", reference())
    with pytest.raises(UsageError) as raised:
        load(tmp_path / "kept", replace(REQUEST, **other))
    assert told in raised.value.message


def test_other_folders_stay_as_they_are(tmp_path: Path) -> None:
    """A folder that holds something else is neither read as a reference nor replaced by one."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="is no reference run"):
        load(tmp_path / "mine")
    with pytest.raises(UsageError, match="mine"):
        save_reference(tmp_path / "mine", reference())
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def edit(**changes: Any) -> Callable[[Path], None]:
    """A change of the manifest's keys; a value that can be called is given the old one."""

    def apply(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        for key, value in changes.items():
            manifest[key] = value(manifest[key]) if callable(value) else value
        (folder / MANIFEST).write_text(json.dumps(manifest))

    return apply


def truncate(folder: Path) -> None:
    raw = (folder / STATES).read_bytes()
    (folder / STATES).write_bytes(raw[:-100])


def flip(folder: Path) -> None:
    raw = bytearray((folder / STATES).read_bytes())
    raw[-1] ^= 1
    (folder / STATES).write_bytes(raw)


def other_tensors(folder: Path) -> None:
    """Sound states with a sound hash, but of another shape than the texts."""
    from ossquant.checkpoint.manifest import hash_file

    save_file({"token_ids": torch.zeros(17, dtype=torch.int32), "hidden_states": torch.zeros(3, 5)}, folder / STATES)
    side = hash_file(folder / STATES)
    edit(states={"nbytes": side.nbytes, "sha256": side.sha256})(folder)


def wild_tokens(folder: Path) -> None:
    """A token id that the model does not have, everything else in order."""
    from ossquant.checkpoint.manifest import hash_file

    states = {"token_ids": torch.full((17,), VOCAB, dtype=torch.int32), "hidden_states": reference().hidden}
    save_file(states, folder / STATES)
    side = hash_file(folder / STATES)
    edit(states={"nbytes": side.nbytes, "sha256": side.sha256})(folder)


HOSTILE: dict[str, Callable[[Path], None]] = {
    "states truncated": truncate,
    "a bit flipped": flip,
    "states gone": lambda folder: (folder / STATES).unlink(),
    "other tensors": other_tensors,
    "wild tokens": wild_tokens,
    "manifest empty": lambda folder: (folder / MANIFEST).write_bytes(b""),
    "manifest a list": lambda folder: (folder / MANIFEST).write_bytes(b"[]"),
    "manifest nested": lambda folder: (folder / MANIFEST).write_bytes(b"[" * 10**6),
    "manifest a pickle": lambda folder: (folder / MANIFEST).write_bytes(b"\x80\x04N."),
    "no request": edit(request=None),
    "request with more keys": edit(request=lambda request: request | {"code": "import os"}),
    "no texts": edit(texts=[]),
    "texts of text": edit(texts=["abc"]),
    "a text of nothing": edit(texts=lambda texts: [[0, 0, 0], *texts]),
    "scored from before": edit(texts=lambda texts: [[5, -2, 1], *texts[1:]]),
    "scored from beyond": edit(texts=lambda texts: [[5, 5, 1], *texts[1:]]),
    "a huge text": edit(texts=lambda texts: [[2**70, 2, 1], *texts[1:]]),
    "a negative stop": edit(stops=[-1]),
    "stops of text": edit(stops=["a"]),
    "states of nobody": edit(states={}),
}


@pytest.mark.parametrize("damage", HOSTILE.values(), ids=list(HOSTILE))
def test_a_damaged_reference_is_refused(damage: Callable[[Path], None], tmp_path: Path) -> None:
    """A reference that is cut, changed or made up is a CheckpointError that says what to do, and nothing is run."""
    save_reference(tmp_path / "kept", reference())
    damage(tmp_path / "kept")
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path / "kept")
    assert raised.value.hint


def test_killed_it_is_not_there(tmp_path: Path) -> None:
    """Killed at any of its operations on files, saving leaves no folder that is taken for a reference, or a whole one.

    Saving again then works.
    """
    whole, nothing = 0, 0
    for operation in range(1, 40):
        folder = tmp_path / f"try-{operation}/kept"
        if not killed(lambda folder=folder: save_reference(folder, reference()), tmp_path, operation):  # type: ignore[misc]
            break
        if load(folder) is None:
            nothing += 1
            save_reference(folder, reference())
        else:
            whole += 1
        assert load(folder) is not None
    assert nothing >= 3
