"""A folder as an export to GGUF leaves it, of the trained tiny model; only the weights in it are zeros."""

import shutil
from pathlib import Path

from ossquant.checkpoint.manifest import MANIFEST, TensorEntry, make_manifest
from ossquant.checkpoint.reader import open_checkpoint
from ossquant.layout import Role
from ossquant.plan import Plan, make_plan
from ossquant.recipe import Recipe
from ossquant.scheme import Scheme


def make_gguf_folder(
    source: Path, folder: Path, experts: str = "mxfp4", dense: str = "q8_0", shards: int = 1, name: str = "gpt-oss"
) -> Plan:
    """Write config, manifest, Modelfile and files of as many bytes as the tensors have."""
    folder.mkdir()
    schemes = dict.fromkeys(Role, Scheme("f32")) | {Role.EXPERTS: Scheme(experts)}
    schemes |= dict.fromkeys((Role.ATTENTION, Role.EMBEDDING, Role.LM_HEAD), Scheme(dense))
    files = [f"{name}-{index:05}-of-{shards:05}.gguf" for index in range(1, shards + 1)] if shards > 1 else [
        f"{name}.gguf"]  # fmt: skip
    with open_checkpoint(source) as checkpoint:
        plan = make_plan(checkpoint.spec, Recipe("gguf", "", schemes))
        tensors = {
            entry.tensor.name: TensorEntry(files[index % shards], 2**23, "0" * 64)
            for index, entry in enumerate(plan.tensors)
        }
        manifest = make_manifest(checkpoint, str(source), "gguf", plan, tensors)
    (folder / MANIFEST).write_bytes(manifest.to_json())
    shutil.copy(source / "config.json", folder)
    (folder / "Modelfile").write_text(f"FROM ./{name}*.gguf\n")
    for file in files:
        (folder / file).write_bytes(b"GGUF".ljust(plan.nbytes // shards + 64, b"\0"))
    return plan
