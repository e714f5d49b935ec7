"""Where a checkpoint keeps its weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Names:
    """Names of tensors; of several for the embedding the first that exists counts. blocks: for each block its norm's
    weight, and what the names of each mixer's tensors begin with. renamed: what they go on with, where that is not the
    name in Hugging Face's Llama or Mamba; "gate_up_proj" and "up_gate_proj" stand for one matrix of two, in that
    order, and with "gate_up_proj" the matrices of all experts are one tensor; "gate_exps" and so on stand for those of
    all experts' gates."""

    embedding: tuple[str, ...]
    norm: str
    head: str
    blocks: tuple[tuple[str, ...], ...]
    renamed: Mapping[str, str] = field(default_factory=dict)
