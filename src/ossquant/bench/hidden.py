"""Last hidden states, and the logits that a head makes of them: 70 times smaller to keep than the logits."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ossquant.bench.text import Text
from ossquant.checkpoint.reader import Checkpoint
from ossquant.codec.expand import expand, pieces
from ossquant.errors import CheckpointError, UsageError
from ossquant.layout import Role
from ossquant.memory.transformers import PREFILL_CHUNK
from ossquant.runtime.fixed_cache import CACHE

BLOCK_ROWS = 128  # positions whose logits are there at a time: 103 MB of the published vocabulary
HEAD_ROWS = 2**13  # of the head in float32 at a time: 94 MB of the published size

# texts done so far, of how many
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Logits:
    """The logits of hidden states (rows, hidden) by a head (vocab, hidden), computed in float32 where the head lies."""

    hidden: torch.Tensor
    head: torch.Tensor

    def rows(self, begin: int, end: int) -> torch.Tensor:
        """The logits (rows, vocab) of some positions."""
        hidden = self.hidden[begin:end].to(self.head.device, torch.float32)
        return torch.cat([hidden @ part.float().T for part in self.head.split(HEAD_ROWS)], dim=1)

    def blocks(self) -> Iterator[torch.Tensor]:
        """All of them, some positions at a time."""
        for begin in range(0, len(self.hidden), BLOCK_ROWS):
            yield self.rows(begin, min(begin + BLOCK_ROWS, len(self.hidden)))


@torch.inference_mode()
def hidden_states(model: Any, texts: Sequence[Text], name: str, progress: Progress | None = None) -> torch.Tensor:
    """Run texts one by one; gives what the head would see where scored tokens are predicted: (scored, hidden).

    On the host, in the dtype that the model computes in. Texts go through in chunks, as prompts do in `run`. Raises
    UsageError for a text beyond the model's context, CheckpointError for NaN or infinity.
    """
    longest = model.config.max_position_embeddings
    parts = []
    for number, text in enumerate(texts, 1):
        if len(text.token_ids) > longest:
            raise UsageError(f"text {number} is {len(text.token_ids)} tokens, the context of {name} {longest}")
        part = _hidden(model, text)
        if not part.isfinite().all():
            raise CheckpointError(
                f"{name}: NaN or infinity in its hidden states at text {number}", hint=f"ossquant verify {name}"
            )
        parts.append(part)
        if progress:
            progress(number, len(texts))
    return torch.cat(parts)


def _hidden(model: Any, text: Text) -> torch.Tensor:
    """The last token predicts nothing that is scored."""
    cache, parts = None, []
    for chunk in torch.tensor([text.token_ids[:-1]], device=model.device).split(PREFILL_CHUNK, dim=1):
        output = model.model(chunk, use_cache=True, **{CACHE: cache})
        cache = output[CACHE]
        parts.append(output.last_hidden_state[0].cpu())
    return torch.cat(parts)[text.begin - 1 :]


def read_head(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Read lm_head (vocab, hidden), whatever its scheme, rounded to the dtype that is computed in."""
    (entry,) = (entry for entry in checkpoint.plan.tensors if entry.tensor.role is Role.LM_HEAD)
    head, at = torch.empty(entry.tensor.shape, dtype=dtype), 0
    for piece in pieces(entry.tensor):
        for rows in expand(checkpoint, entry, piece):
            head[at : at + len(rows)] = torch.from_numpy(rows)
            at += len(rows)
    return head.to(device)
