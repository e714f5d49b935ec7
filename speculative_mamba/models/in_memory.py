"""Models of transformers that are in memory already: what cannot be taken over, and whether they are what they were."""

import json
import weakref
from collections.abc import Iterator, Mapping

import torch

from ..ops.values import shown
from .formats import Names
from .weights import StoredTensor

_OWN_HOOKS = "transformers.utils."  # with which transformers records hidden states; they change nothing


def check_model(model: object) -> None:
    """A model of transformers that computes what its configuration says, from its own weights.

    Raises:
        ValueError: it is something else, or something was put on it or into it.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise ValueError(f"{_name(model)} is compiled (torch.compile); give the model as it was before")
    if not isinstance(model, torch.nn.Module):
        what = f"{shown(model)}; load_model takes names" if isinstance(model, str) else type(model).__name__
        raise ValueError(f"from_transformers takes a model of transformers, such as MambaForCausalLM, got {what}")
    for module in model.modules():
        if type(module).__module__.partition(".")[0] == "peft":
            raise ValueError(
                f"{_name(model)} has adapters ({type(module).__name__} of peft); merge them first: "
                "model.merge_and_unload()"
            )
    if not type(model).__module__.startswith("transformers.") or not hasattr(model, "config"):
        raise ValueError(
            f"{_name(model)} is no class of transformers, so nothing is known of what it computes; from_transformers "
            "takes its own, such as MambaForCausalLM"
        )
    _check_weights(model)
    _check_forward(model)
    if any(module.training for module in model.modules()):
        raise ValueError(f"{_name(model)} is in training mode; call model.eval() first")


def _check_weights(model: torch.nn.Module) -> None:
    if getattr(model, "is_quantized", False):
        method = getattr(model, "quantization_method", None)
        raise ValueError(
            f"{_name(model)} is quantised ({getattr(method, 'value', method)}); load it in bfloat16, float16 or "
            "float32, and give dtype='q8_0' if it is to be small"
        )
    places, devices = set(map(str, getattr(model, "hf_device_map", {}).values())), set()
    hooked = any(hasattr(module, "_hf_hook") for module in model.modules())
    offloaded = len(places) > 1 and not places.isdisjoint(("cpu", "disk"))
    for name, weight in _weights(model):
        on_meta = weight.device.type == "meta"
        if offloaded or (on_meta and hooked):
            where = f" ({', '.join(sorted(places))})" if places else ""
            raise ValueError(f"{_name(model)} is offloaded{where}; load it to one device, without device_map")
        if on_meta:
            raise ValueError(f"{_name(model)} has no weights: {name} is on the meta device; load them first")
        if type(weight) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(
                f"{_name(model)} holds {name} as {type(weight).__name__}; quantised and sharded weights are not "
                "supported"
            )
        devices.add(str(weight.device))
    if len(devices) > 1:
        raise ValueError(f"{_name(model)} lies on {len(devices)} devices, {', '.join(sorted(devices))}; move it to one")


def _check_forward(model: torch.nn.Module) -> None:
    for path, module in model.named_modules():
        where = f"{_name(model)}{'.' if path else ''}{path}"
        hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
        if hasattr(module, "_hf_hook"):
            raise ValueError(
                f"{where} has a hook of accelerate ({type(module._hf_hook).__name__}); remove it with "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
            )
        if any(not str(getattr(hook, "__module__", "")).startswith(_OWN_HOOKS) for hook in hooks):
            raise ValueError(f"{where} has forward hooks, which would not run; remove them first")
        replaced = vars(module).get("forward")  # or put back by whoever replaced it
        if replaced is not None and getattr(replaced, "__func__", None) is not type(module).forward:
            raise ValueError(f"{where} has another forward than its class; it would not be called")


def _name(model: object) -> str:
    return type(model).__name__


def _weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and buffers that are stored, by name; one that has several names comes with each."""
    return iter(model.state_dict(keep_vars=True).items())


def config_of(part: object) -> dict:
    """What ``save_pretrained`` writes of a config, defaults included; nothing of None."""
    return {} if part is None else json.loads(part.to_json_string(use_diff=False))


def tensors_of(model: torch.nn.Module, names: Names) -> dict[str, StoredTensor]:
    """Its weights by the names that they have in files."""
    own, prefix, tensors = f"{model.base_model_prefix}.", names.norm.partition(".")[0], {}
    for name, weight in _weights(model):
        name = f"{prefix}.{name.removeprefix(own)}" if name.startswith(own) else name
        for renamed, part in _as_in_files(name, weight.detach(), names.renamed):
            tensors[renamed] = StoredTensor(part, None)
    return tensors


def _as_in_files(name: str, weight: torch.Tensor, renamed: Mapping[str, str]) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers holds the experts of a layer in tensors (E, N, K), gates before ups; files of some families do so
    under other names, those of the others have a matrix for each."""
    layer, experts, part = name.rpartition(".experts.")
    if experts and weight.ndim == 3:
        if "gate_up_proj" in renamed:
            yield f"{layer}.{renamed.get(part, part)}.weight", weight
            return
        parts = {"gate_proj": 0, "up_proj": 1} if part == "gate_up_proj" else {part: 0}
        for stem, at in parts.items():
            for e, matrix in enumerate(weight):
                yield f"{layer}.experts.{e}.{renamed.get(stem, stem)}.weight", matrix.chunk(len(parts))[at]
        return
    router = renamed.get("router", "")
    if "." in router and name.endswith(f".{router.partition('.')[0]}.weight"):
        name = f"{name.removesuffix('weight')}{router.partition('.')[2]}.weight"
    yield name, weight


class SharedWeights:
    """Weights that are somebody else's. Those that are shared follow what is done to them, but what was computed from
    some when the model was taken over does not, and another device or dtype has other memory."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model, self._states = weakref.ref(model), _states(model)

    @property
    def changed(self) -> bool:
        """Whether any was, as far as PyTorch counts: what is written through ``.data`` it does not."""
        model = self._model()
        return model is not None and _states(model) != self._states

    def check(self, every: float = 0.0) -> None:
        """every: with any time that is not 0 a call is under way, in which nobody looks.

        Raises:
            ValueError: the weights were changed or moved.
        """
        if not every and self.changed:
            raise ValueError(
                f"the weights of {_name(self._model())} were changed, moved or converted since from_transformers took "
                "them over; call it again"
            )


def _states(model: torch.nn.Module) -> list[tuple[str, int, int]]:
    weights = _weights(model)
    return [(name, weight.data_ptr(), 0 if weight.is_inference() else weight._version) for name, weight in weights]
