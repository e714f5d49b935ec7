"""Lossless speculative decoding for Mamba language models."""

import importlib

__version__ = "0.1.0"

# Names are imported when they are first used: the command line has to handle signals before torch is there.
_HOMES = {
    "decode": (
        "Batch",
        "BatchState",
        "CommittedToken",
        "DecodeLoop",
        "Draft",
        "Drafter",
        "EagerExecutor",
        "GenerationCache",
        "GenerationResult",
        "GenerationStats",
        "GraphExecutor",
        "ModelDrafter",
        "NgramDrafter",
        "Proposal",
        "Sampler",
        "SamplingParams",
        "TokenLogprobs",
        "generate",
        "stream",
    ),
    "serve": (
        "Completion",
        "Engine",
        "EngineStats",
        "QueueFullError",
        "Request",
        "RequestOutput",
        "TokenOutput",
    ),
    "models": (
        "MambaLM",
        "ModelConfig",
        "RowState",
        "encode_continuation",
        "from_transformers",
        "load_model",
        "load_pair",
    ),
}

__all__ = sorted(name for names in _HOMES.values() for name in names)


def __getattr__(name: str) -> object:
    home = next((home for home, names in _HOMES.items() if name in names), None)
    if home is not None:
        return getattr(importlib.import_module(f".{home}", __name__), name)
    if name in ("decode", "layers", "models", "ops", "serve"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
