"""What the tests of the loop share: tiny pairs of every dtype and backend, and texts decoded without a draft."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from tokenizers import Tokenizer, decoders, models

import speculative_mamba as sm
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import TableModel, as_dtype, random_model, tiny_architecture, tiny_config
from speculative_mamba.testing.tolerance import assert_bitwise_equal


@dataclasses.dataclass(frozen=True)
class Pair:
    """A tiny target and drafts of it: unrelated ("random"), agreeing now and then ("near"), the target ("equal")."""

    target: sm.MambaLM
    drafts: dict[str, sm.MambaLM]


def _near(target: sm.MambaLM, dtype: torch.dtype) -> sm.MambaLM:
    noise = torch.randn(target.head.shape, generator=torch.Generator().manual_seed(5))
    return dataclasses.replace(target, head=as_dtype(oracle.dense(target.head, torch.float32) + 0.08 * noise, dtype))


def _width(dtype: torch.dtype | str) -> int:
    """Of a tiny model: full blocks where it is to have any, or else no full registers."""
    return 32 if isinstance(dtype, str) else 24


@functools.cache
def _pair(dtype: torch.dtype, backend: str) -> Pair:
    # Untied: with random weights a tied head only repeats the last token.
    config = tiny_config(tie_embeddings=False, d_model=_width(dtype))
    target = random_model(config, dtype=dtype, backend=backend)
    near = _near(target, dtype)
    unrelated = random_model(tiny_config(d_model=16, n_layer=1), dtype=dtype, seed=1, backend=backend)
    return Pair(target, {"random": unrelated, "near": near, "equal": target})


@pytest.fixture(scope="session")
def pair() -> Callable[..., Pair]:
    """pair(dtype, backend)"""
    return lambda dtype=torch.float32, backend="cpu": _pair(dtype, backend)


@functools.cache
def _tiny(kind: str, seed: int, dtype: torch.dtype, backend: str) -> sm.MambaLM:
    unrelated = kind == "unrelated"
    config = tiny_config(d_model=16, n_layer=1) if unrelated else tiny_architecture(kind, seed, _width(dtype))
    return random_model(config, dtype=dtype, seed=seed, backend=backend)


@functools.cache
def _family(
    kind: str, seed: int, mode: str, dtype: torch.dtype, state_dtype: torch.dtype, backend: str
) -> tuple[sm.MambaLM, dict[str, sm.MambaLM]]:
    target = dataclasses.replace(_tiny(kind, seed, dtype, backend), state_dtype=state_dtype, rollback=mode)
    drafts = {
        "equal": target,
        "random": _tiny("unrelated", 7, dtype, backend),
        "near": _near(target, dtype),
        "llama": _tiny("llama", 9 - seed, dtype, backend),
    }
    for name in ("random", "near"):
        for other in ("snapshots", "replay"):
            drafts[f"{name}, {other}"] = dataclasses.replace(drafts[name], state_dtype=state_dtype, rollback=other)
    return target, drafts


@pytest.fixture(scope="session")
def family() -> Callable[..., tuple[sm.MambaLM, dict[str, sm.MambaLM]]]:
    """family(kind, seed, mode, dtype, state_dtype, backend): a target of one of ``ARCHITECTURES``, and drafts of it.

    mode is how the target goes back ("snapshots", "replay"); "near, replay" is the near draft that goes back by inputs.
    """

    def make(kind, seed=0, mode="snapshots", dtype=torch.float32, state_dtype=torch.float32, backend="cpu"):
        return _family(kind, seed, mode, dtype, state_dtype, backend)

    return make


@pytest.fixture(scope="session")
def plain() -> Callable[..., tuple[list[int], torch.Tensor]]:
    """plain(model, prompt, tokens): sequence and logits of greedy decoding without a draft, of one row alone."""
    known = {}

    def decode(model: sm.MambaLM, prompt: list[int], tokens: int) -> tuple[list[int], torch.Tensor]:
        key = id(model), tuple(prompt), tokens
        if key not in known:
            result = sm.generate(model, [prompt], max_new_tokens=tokens, stop_token_ids=(), output_logits=True)
            known[key] = model, result.sequences[0].tolist(), result.logits[0]
        return known[key][1:]

    return decode


@pytest.fixture(scope="session")
def prompt() -> Callable[..., list[int]]:
    """prompt(length, seed): token ids for the tiny models."""

    def make(length: int, seed: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(1000 * seed + length)
        return torch.randint(0, tiny_config().vocab_size, (length,), generator=generator).tolist()

    return make


@pytest.fixture(scope="session")
def assert_slot_holds() -> Callable[..., None]:
    """assert_slot_holds(model, cache, row, slot, tokens): the slot of every layer equals a prefill of ``tokens``.

    Whatever its layer remembers, bit for bit: state and the W-1 inputs that end there, or keys and values.
    """
    known = {}

    def fresh(model: sm.MambaLM, tokens: tuple[int, ...]) -> list[tuple[torch.Tensor, ...]]:
        """What each layer remembers of a prefill, which is computed once."""
        key = id(model), tokens
        if key not in known:
            cache = model.new_cache(1, 1)
            model.prefill(list(tokens), cache, 0)
            known[key] = model, [layer.snapshot(0, 0) for layer in cache]
        return known[key][1]

    def check(model: sm.MambaLM, cache: list, row: int, slot: int, tokens: list[int]) -> None:
        for index, (layer, expected) in enumerate(zip(cache, fresh(model, tuple(tokens)), strict=True)):
            what = f"layer {index}, row {row}, slot {slot}, after {len(tokens)} tokens"
            for part, right in zip(layer.snapshot(row, slot), expected, strict=True):
                assert_bitwise_equal(part, right, what)

    return check


@pytest.fixture(scope="session")
def assert_states_fit(assert_slot_holds) -> Callable[..., None]:
    """assert_states_fit(cache, complete): every saved state is, bit for bit, that of the text it claims to have read.

    With ``complete`` the target's has read all but the last token of its row.
    """

    def check(cache: sm.GenerationCache, complete: bool = True) -> None:
        for model, states in ((cache.target, cache.target_states), (cache.draft, cache.draft_states)):
            for row, state in enumerate(states):
                if complete and model is cache.target and states is cache.target_states:
                    assert len(state.tokens) == len(cache.sequences[row]) - 1
                if state is not None:
                    assert len(state.tokens) < len(cache.sequences[row])
                    restored = model.new_cache(1, 1)
                    for layer, saved in zip(restored, state.layers, strict=True):
                        layer.restore(0, saved)
                    assert_slot_holds(model, restored, 0, 0, cache.sequences[row][: len(state.tokens)])

    return check


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """threads(n) sets torch's number of threads for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def chain() -> Callable[[list[bytes]], TableModel]:
    """chain(pieces): a model with a tokenizer. Token i stands for piece i and is always followed by token i+1."""

    def make(pieces: list[bytes]) -> TableModel:
        model = TableModel(torch.eye(len(pieces)).roll(1, dims=1))
        vocabulary = {"".join(map(_byte_name, piece)): token for token, piece in enumerate(pieces)}
        assert len(vocabulary) == len(pieces), "pieces must differ"
        model.tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        model.tokenizer.decoder = decoders.ByteLevel()
        return model

    return make


@functools.cache
def _byte_names() -> list[str]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    names = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return [names[byte] for byte in range(256)]


def _byte_name(byte: int) -> str:
    """The character by which byte-level tokenizers write a byte."""
    return _byte_names()[byte]
