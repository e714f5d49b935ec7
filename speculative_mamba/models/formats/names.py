"""Where a checkpoint keeps its weights."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Names:
    """Names of tensors; of several for the embedding the first that exists counts. blocks: for each block its norm's
    weight, and what the names of its mixer's tensors begin with."""

    embedding: tuple[str, ...]
    norm: str
    head: str
    blocks: tuple[tuple[str, str], ...]
