"""Plan: every tensor of a model, its scheme, the stored tensors that make it up."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ossquant.errors import CheckpointError, UnsupportedError
from ossquant.layout import Role, TensorInfo, tensors, unsloth_name
from ossquant.recipe import BF16, Recipe
from ossquant.scheme import BLOCK_SIZES, BNB_FORMATS, Scheme, StoredTensor, expert_name
from ossquant.spec import ModelSpec

QUANTIZED = (Role.EXPERTS, Role.ATTENTION, Role.LM_HEAD)  # roles that may have a scheme other than bf16


@dataclass(frozen=True)
class TensorPlan:
    """One tensor and how it is stored."""

    tensor: TensorInfo
    scheme: Scheme
    experts: Scheme | None = None  # of the experts that these biases belong to
    unsloth: bool = False  # under the name that unsloth has for it

    @cached_property
    def stored(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that stand for it."""
        name, shape = self.tensor.name, self.tensor.shape
        name = unsloth_name(name) if self.unsloth else name
        if self.experts is not None and self.experts.is_bnb:
            # biases lie beside their experts, and bitsandbytes' experts lie one by one
            return tuple(part for e in range(shape[0]) for part in self.scheme.stored(expert_name(name, e), shape[1:]))
        return self.scheme.stored(name, shape)

    @property
    def nbytes(self) -> int:
        """Bytes of its stored tensors."""
        return self.scheme.nbytes(self.tensor.shape)


@dataclass(frozen=True)
class RoleTotal:
    """One line of a plan's table."""

    role: Role
    scheme: Scheme
    tensors: int
    parameters: int
    nbytes: int

    @property
    def bits_per_weight(self) -> float:
        """Stored bits a parameter, block scales included."""
        return 8 * self.nbytes / self.parameters


@dataclass(frozen=True)
class Plan:
    """What a checkpoint of a spec holds, byte for byte."""

    spec: ModelSpec
    tensors: tuple[TensorPlan, ...]

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all stored tensors: the index's total_size, without the files' headers."""
        return sum(entry.nbytes for entry in self.tensors)

    @cached_property
    def parameters(self) -> int:
        """Parameters of the model."""
        return sum(entry.tensor.numel for entry in self.tensors)

    @cached_property
    def parameters_4bit(self) -> int:
        """Parameters whose scheme takes four bits."""
        return sum(entry.tensor.numel for entry in self.tensors if entry.scheme.is_4bit)

    @cached_property
    def role_nbytes(self) -> Mapping[Role, int]:
        """Bytes of each role's stored tensors."""
        totals = dict.fromkeys(Role, 0)
        for entry in self.tensors:
            totals[entry.tensor.role] += entry.nbytes
        return totals

    @cached_property
    def has_bnb(self) -> bool:
        """Whether anything is stored as bitsandbytes has it, so that our own loader must read it."""
        return any(self.scheme(role).is_bnb for role in QUANTIZED)

    @property
    def unsloth(self) -> bool:
        """Whether it has unsloth's names."""
        return any(entry.unsloth for entry in self.tensors)

    @cached_property
    def role_parameters(self) -> Mapping[Role, int]:
        """Parameters of each role's tensors."""
        totals = dict.fromkeys(Role, 0)
        for entry in self.tensors:
            totals[entry.tensor.role] += entry.tensor.numel
        return totals

    def scheme(self, role: Role) -> Scheme:
        """The scheme of a role's tensors; a role has one."""
        return next(entry.scheme for entry in self.tensors if entry.tensor.role is role)

    def by_role(self) -> list[RoleTotal]:
        """Add the tensors up by role, largest first."""
        totals = []
        for role in Role:
            entries = [entry for entry in self.tensors if entry.tensor.role is role]
            totals.append(
                RoleTotal(
                    role=role,
                    scheme=entries[0].scheme,
                    tensors=sum(len(entry.stored) for entry in entries),
                    parameters=sum(entry.tensor.numel for entry in entries),
                    nbytes=sum(entry.nbytes for entry in entries),
                )
            )
        return sorted(totals, key=lambda total: -total.nbytes)


def make_plan(spec: ModelSpec, recipe: Recipe) -> Plan:
    """Give every tensor its recipe's scheme. Raises UnsupportedError where a block does not divide a row."""
    return Plan(spec, tuple(_entry(tensor, recipe) for tensor in tensors(spec)))


def _entry(tensor: TensorInfo, recipe: Recipe) -> TensorPlan:
    if tensor.role is Role.EXPERT_BIAS:
        return TensorPlan(tensor, recipe.scheme(tensor.role), recipe.scheme(Role.EXPERTS), recipe.unsloth)
    scheme = recipe.scheme(tensor.role)
    scheme.check(tensor.name, tensor.shape)
    return TensorPlan(tensor, scheme, unsloth=recipe.unsloth)


def read_plan(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> Plan:
    """Work out from a checkpoint's headers how it stores each role, and that nothing is amiss.

    Raises CheckpointError for a tensor that is missing, unexpected or of another shape or dtype.
    """
    schemes = {role: _detect(spec, stored, role) for role in QUANTIZED}
    recipe = Recipe("as stored", "", schemes, unsloth=_has_unsloth_names(spec, stored))
    plan = make_plan(spec, recipe)
    expected = set()
    for entry in plan.tensors:
        for part in entry.stored:
            _check_stored(part, stored)
            expected.add(part.name)
    unexpected = next((name for name in stored if name not in expected), None)
    if unexpected:
        raise CheckpointError(f"tensor '{unexpected}' is not part of a gpt-oss model stored this way")
    return plan


def _has_unsloth_names(spec: ModelSpec, stored: Mapping[str, StoredTensor]) -> bool:
    router = next(tensor.name for tensor in tensors(spec) if tensor.role is Role.ROUTER)
    return router not in stored and unsloth_name(router) in stored


def _check_stored(part: StoredTensor, stored: Mapping[str, StoredTensor]) -> None:
    found = stored.get(part.name)
    if found is None:
        raise CheckpointError(f"tensor '{part.name}' is missing", hint="fetch or make the checkpoint again")
    if not _matches(found, part):
        raise CheckpointError(
            f"tensor '{part.name}' is {found.dtype} {list(found.shape)}, config.json asks for "
            f"{part.dtype} {list(part.shape)}",
            hint="config.json and the weights are not of the same model",
        )


def _matches(found: StoredTensor, expected: StoredTensor) -> bool:
    if ".quant_state." in expected.name:
        # JSON whose length depends on who wrote it
        return found.dtype == "U8" and len(found.shape) == 1 and 0 < found.nbytes <= 4096
    return found == expected


def _detect(spec: ModelSpec, stored: Mapping[str, StoredTensor], role: Role) -> Scheme:
    """Find one role's scheme by the names of its first tensor."""
    tensor = next(tensor for tensor in tensors(spec) if tensor.role is role)
    if f"{tensor.name}_blocks" in stored:
        return Scheme("mxfp4")
    name = expert_name(tensor.name, 0) if role is Role.EXPERTS else tensor.name
    for quant_type in BNB_FORMATS:
        if f"{name}.quant_state.bitsandbytes__{quant_type}" in stored:
            return _detect_bnb(quant_type, tensor, name, stored)
    if role is Role.EXPERTS and Scheme("int4").stored(tensor.name, tensor.shape)[0].name in stored:
        return Scheme("int4")
    if tensor.name in stored:
        if stored[tensor.name].dtype not in ("BF16", "U8"):
            raise UnsupportedError(
                f"tensor '{tensor.name}' is {stored[tensor.name].dtype}, not BF16",
                hint="save the model with torch_dtype=bfloat16 first",
            )
        return BF16
    raise CheckpointError(
        f"no '{tensor.name}' in any form ossquant knows (bf16, MXFP4, NF4, FP4, INT4)",
        hint="fetch the checkpoint again; original/ and metal/ layouts are not supported",
    )


def _detect_bnb(quant_type: str, tensor: TensorInfo, name: str, stored: Mapping[str, StoredTensor]) -> Scheme:
    rows, columns = tensor.shape[-2:]
    absmax = stored.get(f"{name}.absmax")
    blocks = absmax.shape[0] if absmax and len(absmax.shape) == 1 else 0
    block_size = rows * columns // blocks if blocks else 0
    if block_size not in BLOCK_SIZES:
        raise CheckpointError(f"tensor '{name}': its absmax does not fit blocks of {BLOCK_SIZES}")
    return Scheme(quant_type, block_size, f"{name}.nested_absmax" in stored)
