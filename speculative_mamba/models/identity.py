"""Whether a model is still the same: as an object, by its weights, and in all that a captured round relies on."""

import hashlib
import weakref
from dataclasses import dataclass, field

import torch

from ..ops.block_weight import BlockWeight
from .language_model import MambaLM

_SAMPLED = 32  # elements of a tensor that its model is known by


class IdentityKey:
    """A key that an object is equal to itself by, and that keeps it: no later object can have its place."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdentityKey) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)


def weights_of(model: object) -> list[torch.Tensor]:
    """The tensors that a model computes with."""
    weights = [model.embedding, *model.weights()] if isinstance(model, MambaLM) else vars(model).values()
    weights = [weight.data if isinstance(weight, BlockWeight) else weight for weight in weights]
    return [weight for weight in weights if isinstance(weight, torch.Tensor)]


def options_of(model: object) -> tuple:
    """What else its results depend on."""
    if not isinstance(model, MambaLM):
        return type(model).__qualname__, model.vocab_size
    return model.config, model.state_dtype, model.rollback, model.backend


def backend_of(model: object) -> str:
    """The backend of the ops of a model."""
    return model.backend if isinstance(model, MambaLM) else "auto"


def memory_of(model: object) -> list:
    """What a captured round takes for granted of a model: its options, and where its weights lie and how.

    The list keeps that memory, since rounds that wait would read it. Nothing is known of a foreign model.
    """
    return [options_of(model), *map(_Memory.of, weights_of(model))] if isinstance(model, MambaLM) else []


@dataclass
class _Memory:
    """Where a tensor lies, and how."""

    layout: tuple
    storage: torch.UntypedStorage = field(compare=False)

    @staticmethod
    def of(tensor: torch.Tensor) -> "_Memory":
        layout = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device
        return _Memory(layout, tensor.untyped_storage())


class KnownModel:
    """Knows a model again without keeping it alive, by its weights also where it was loaded again or elsewhere."""

    def __init__(self, model: object) -> None:
        self._model, self._fingerprint = weakref.ref(model), _fingerprint(model)

    @staticmethod
    def recalled(fingerprint: str) -> "KnownModel":
        """One that was written down."""
        known = object.__new__(KnownModel)
        known._model, known._fingerprint = None, fingerprint
        return known

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    def __getstate__(self) -> dict:
        return {"_model": None, "_fingerprint": self._fingerprint}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KnownModel) and other._fingerprint == self._fingerprint

    def model(self) -> object:
        """The model, while somebody else holds it."""
        return self._model and self._model()

    @staticmethod
    def of(model: object, known: "KnownModel | None") -> "KnownModel":
        """``known`` if it is of this very object, else anew."""
        return known if known is not None and known.model() is model else KnownModel(model)


def _fingerprint(model: object) -> str:
    digest = hashlib.sha256(repr(options_of(model)).encode())
    for tensor in weights_of(model):
        flat = tensor.detach().reshape(-1)
        part = flat[:: max(1, len(flat) // _SAMPLED)].contiguous().view(torch.uint8).cpu()
        digest.update(repr((tensor.shape, tensor.dtype)).encode() + part.numpy().tobytes())
    return digest.hexdigest()
