"""The engines that ``benchmarks.peers`` times, each behind the same few calls."""

import ctypes
import importlib
import logging
import time
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch

import speculative_mamba as sm
from speculative_mamba.decode import ModelDrafter
from speculative_mamba.ops.threads import num_threads
from speculative_mamba.testing.models import random_model
from speculative_mamba.testing.scripted import CapturableScript, agree_at_rate
from speculative_mamba.testing.timing import timed_turn

from .decode import LOOKAHEAD, draft_config

WINDOW = LOOKAHEAD + 1
RATE = 0.8


class Engine(ABC):
    """An engine that has loaded a model.

    prefill: from an empty state, (1, V) logits of the last token. feed: (T, V) logits of every token, going on from the
    state; one that does not ``goes_on`` feeds several tokens from an empty state only. Logits are valid up to the next
    call. modules: what must be installed.
    """

    name: str
    modules: tuple[str, ...]
    goes_on = True
    weight_bytes: int

    @abstractmethod
    def __init__(self, source: Path, weights: str, longest: int) -> None: ...

    @abstractmethod
    def prefill(self, tokens: list[int]) -> torch.Tensor: ...

    @abstractmethod
    def feed(self, tokens: list[int]) -> torch.Tensor: ...

    def probe(self, prompt: list[int]) -> np.ndarray:
        """Logits of the prompt's last seven tokens: one after a prefill, five in a window if it can, one in a step."""
        parts = [self.prefill(prompt[:-6]).clone()]
        window = [prompt[-6:-1]] if self.goes_on else [[token] for token in prompt[-6:-1]]
        parts += [self.feed(tokens).clone() for tokens in (*window, prompt[-1:])]
        return torch.cat(parts).detach().float().numpy()

    def time_call(self, op: str, tokens: list[int]) -> float:
        """Seconds of a call, "step", "verify" or "prefill" of these tokens."""
        function = self.prefill if op == "prefill" else self.feed
        return timed_turn(lambda: function(tokens))

    def seconds_per_token(self, prompt: list[int], count: int) -> float:
        """Of plain greedy decoding."""
        self.prefill(prompt[:-1])
        token = prompt[-1]
        started = time.perf_counter()
        for _ in range(count):
            token = int(self.feed([token])[0].numpy().argmax())
        return (time.perf_counter() - started) / count


class Ours(Engine):
    """``verify`` and ``prefill`` of this package."""

    name, modules = "ours", ("speculative_mamba",)

    def __init__(self, source: Path, weights: str, longest: int) -> None:
        self.model = sm.load_model(source, dtype=None if source.is_file() else weights)
        self.weight_bytes = self.model.weight_bytes
        self._slot = torch.zeros(1, dtype=torch.int32)
        self._cache = None
        self._cost = None

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        self._cache = self.model.new_cache(1, WINDOW)
        self._slot.zero_()
        self.model.prefill(tokens[:-1], self._cache, 0)
        return self.feed(tokens[-1:])

    def feed(self, tokens: list[int]) -> torch.Tensor:
        logits = self.model.verify(torch.tensor([tokens]), self._cache, self._slot)
        self._slot.fill_(len(tokens) - 1)
        return logits[0]

    def seconds_per_token(self, prompt: list[int], count: int) -> float:
        return 1 / self._decode(prompt, count).stats.tokens_per_s

    def scripted(self, prompt: list[int], count: int, seed: int) -> sm.GenerationStats:
        """Statistics of a run with a draft that is right at a rate, and costs what one of 1/20 of the target does.

        Raises:
            ValueError: its text is not that of plain decoding.
        """
        text = self._decode(prompt, count).sequences[0].tolist()
        if self._cost is None:
            self._cost = random_model(draft_config(self.model), dtype=torch.bfloat16, seed=1)
            assert self._cost.weight_bytes * 20 <= self.weight_bytes
        agrees = agree_at_rate(RATE, seed)
        draft = CapturableScript([text], self.model.vocab_size, agrees, cost=ModelDrafter(self._cost))
        result = self._decode(prompt, count, draft)
        if result.sequences[0].tolist() != text:
            raise ValueError("the text with a draft differs from plain decoding")
        return result.stats

    def _decode(self, prompt: list[int], count: int, draft: CapturableScript | None = None) -> sm.GenerationResult:
        settings = {"lookahead": LOOKAHEAD, "max_new_tokens": count, "stop_token_ids": ()}
        return sm.generate(self.model, [prompt], draft=draft, **settings)


class LlamaCpp(Engine):
    """llama.cpp through the C interface of llama-cpp-python: the clock sees llama_decode and little else."""

    name, modules = "llama.cpp", ("llama_cpp", "gguf")

    def __init__(self, source: Path, weights: str, longest: int) -> None:
        self._api = api = importlib.import_module("llama_cpp")
        logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)
        api.llama_backend_init()
        self._model = api.llama_model_load_from_file(str(source).encode(), api.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {source.name}")
        settings = api.llama_context_default_params()
        settings.n_ctx = settings.n_batch = longest
        settings.n_threads = settings.n_threads_batch = num_threads()
        self._context = api.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError("llama.cpp gives no context")
        self._vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self.weight_bytes = api.llama_model_size(self._model)

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), False)
        return self._decode(tokens, wanted=1)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        return self._decode(tokens, wanted=len(tokens))

    def _decode(self, tokens: list[int], wanted: int) -> torch.Tensor:
        """Logits of the last ``wanted`` tokens; with no positions given llama.cpp counts on from the last call's."""
        count = len(tokens)
        logits_of = (ctypes.c_int8 * count)(*(at >= count - wanted for at in range(count)))
        batch = self._api.llama_batch(n_tokens=count, token=(ctypes.c_int32 * count)(*tokens), logits=logits_of)
        if self._api.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        pointer = self._api.llama_get_logits(self._context)
        size = ctypes.c_float * (wanted * self._vocabulary)
        logits = size.from_address(ctypes.addressof(pointer.contents))
        return torch.frombuffer(logits, dtype=torch.float32).view(wanted, -1)


class Transformers(Engine):
    """``MambaForCausalLM`` called as its ``generate`` calls it."""

    name, modules, goes_on = "transformers", ("transformers",), False

    def __init__(self, source: Path, weights: str, longest: int) -> None:
        transformers = importlib.import_module("transformers")
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()
        self._model = transformers.MambaForCausalLM.from_pretrained(source, dtype=getattr(torch, weights)).eval()
        self.weight_bytes = sum(p.numel() * p.element_size() for p in self._model.parameters())
        self._cache = None

    def prefill(self, tokens: list[int]) -> torch.Tensor:
        return self._forward(tokens, None, logits_to_keep=1)

    def feed(self, tokens: list[int]) -> torch.Tensor:
        return self._forward(tokens, self._cache if len(tokens) == 1 else None)

    @torch.no_grad()
    def _forward(self, tokens: list[int], cache: object, **options: int) -> torch.Tensor:
        result = self._model(torch.tensor([tokens]), cache=cache, use_cache=True, **options)
        self._cache = result.cache
        return result.logits[0]
