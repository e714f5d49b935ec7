"""A language model: embedding, blocks, norm, head."""

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from tokenizers import Tokenizer

from ..layers.block import Block, Mixer, Summands, add_and_norm
from ..layers.cache import AttentionCache, CacheSizes, LayerCache, MambaCache, Window, grown_capacity
from ..layers.experts import Experts
from ..layers.model_ops import skinny_linear
from ..ops import embed_tokens
from ..ops.backend import has_tiles
from ..ops.block_weight import BlockWeight
from ..ops.checks import check_follows, check_start_slot, token_ids
from ..ops.expert_weight import ExpertWeight
from ..ops.recording import (
    Recording,
    ResultPool,
    StaleRecordingError,
    is_recording,
    new_result,
    next_stage,
    record,
    torch_op,
)
from ..ops.sampling_params import SamplingParams
from .chat import ChatTemplate
from .config import ModelConfig
from .files import MappedFile
from .in_memory import SharedWeights
from .sampling_defaults import default_sampling
from .tokenizer import encode, text_tokenizer
from .vocabulary import Vocabulary

PREFILL_CHUNK = 64  # tokens in one pass
PREFILL_CHUNK_OF_TILES = 512  # where arithmetic costs so little that weights are to be read less often
ROLLBACKS = ("auto", "snapshots", "replay")
_FILES_ARE_LOOKED_AT_EVERY = 0.05  # seconds, between the rounds of one call


class ModelCache(list[LayerCache]):
    """A cache for each layer that has a state, and the recorded steps that work on them, by the shape of the call.

    watches_model: before a step is run again, see that the model is made of the same parts in the same memory. Whoever
    keeps the cache for a time in which the model stays as it is saves the look, some 0.1 ms for every sixteen layers.
    """

    def __init__(self, layers: Iterable[LayerCache]) -> None:
        super().__init__(layers)
        self.steps: dict[tuple, _RecordedStep] = {}
        self.watches_model = True

    def __reduce__(self) -> tuple:
        return ModelCache, (list(self),)  # a copy records anew

    def __repr__(self) -> str:
        return f"ModelCache({len(self)} layers, {sum(t.nbytes for layer in self for t in layer.tensors())} bytes)"


@dataclass
class _RecordedStep:
    """A model's calls for one shape of step: tensors to fill, a recording to run, logits to read."""

    model: list[object]  # all that the recorded calls were made from
    tokens: torch.Tensor
    window: Window
    recording: Recording
    logits: torch.Tensor
    normed: torch.Tensor  # in memory of the recording
    results: ResultPool = field(default_factory=ResultPool)


def _as_ids(tokens: Sequence[int]) -> torch.Tensor:
    """(L), on the CPU unless they are a tensor already."""
    try:
        ids = tokens if isinstance(tokens, torch.Tensor) else torch.as_tensor(tokens, device="cpu")
    except (TypeError, ValueError, RuntimeError):  # what is no number, of rows of many lengths, beyond 64 bits
        ids = None
    if ids is None or ids.ndim != 1:
        what = type(tokens).__name__ if ids is None else f"shape {tuple(ids.shape)}"
        raise ValueError(f"tokens must be a list of token ids, got {what}")
    return ids


def _are_same(objects: list[object], others: list[object]) -> bool:
    return len(objects) == len(others) and all(map(operator.is_, objects, others))


def _nothing() -> None:
    return None


@dataclass(repr=False)
class MambaLM:
    """Weights and the two ways to run them; all state lives in the cache that the caller passes.

    embedding and head: (V, d), the same tensor when tied; norm_weight: (d); head_bias: (V) float32 or None.
    ``load_tokenizer`` is called when text is first needed; token ids need none. ``state_dtype`` (float32, bfloat16,
    float16) is that of the recurrent state and of cached keys and values; ``rollback`` ("auto", "snapshots", "replay")
    as in ``load_model``; ``fused_layers``: whether layers take the ops that do what several do, with the same bits in
    fewer launches. vocabulary: what the ids mean, as far as it is known. files: those in which weights lie, or
    whose they are.
    ``load_chat_template`` is called when a conversation is first written. generation_config: the file's content.

    A pickled or deeply copied model holds its weights itself.
    """

    config: ModelConfig
    embedding: torch.Tensor | BlockWeight
    blocks: list[Block]
    norm_weight: torch.Tensor
    head: torch.Tensor | BlockWeight
    name: str = "model"
    load_tokenizer: Callable[[], Tokenizer | None] = _nothing
    backend: str = "auto"
    state_dtype: torch.dtype = torch.float32
    rollback: str = "auto"
    fused_layers: bool = False
    head_bias: torch.Tensor | None = None
    vocabulary: Vocabulary | None = None
    files: tuple[MappedFile | SharedWeights, ...] = ()
    load_chat_template: Callable[[], ChatTemplate | None] = _nothing
    generation_config: Mapping[str, object] = field(default_factory=dict)
    _recorded: set[tuple] = field(default_factory=set, init=False, compare=False)  # kinds of steps

    def __post_init__(self) -> None:
        if self.vocabulary is None:
            self.vocabulary = Vocabulary(self.vocab_size)

    def __repr__(self) -> str:
        kinds = ", ".join(
            f"{count} {kind}" for kind, count in Counter(type(mixer).__name__ for mixer in self.mixers).items()
        )
        return (
            f"MambaLM({self.name!r}: {kinds}; d_model {self.config.d_model}, {self.vocab_size} tokens; "
            f"{str(self.embedding.dtype).rpartition('.')[2]} weights of {self.weight_bytes / 1e6:.1f} MB on "
            f"{self.device}, backend {self.backend})"
        )

    def __getstate__(self) -> dict[str, object]:
        return self.__dict__ | {"files": ()}

    def __copy__(self) -> "MambaLM":
        """Another model with the same weights, which lie in the same files."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        return other

    def forbid(self, tokens: Collection[int], *, copy: bool = False) -> None:
        """Makes these ids impossible: their logits are -inf from now on. All others keep their bits. copy: the head's
        memory is somebody else's, and gets one of its own."""
        if not tokens:
            return
        if copy and isinstance(self.head, torch.Tensor):
            self.head = self.head.clone()
        ids = torch.tensor(list(tokens), dtype=torch.long, device=self.device)
        # Padding may hold anything, also NaN; a mapped file stays as it is.
        if isinstance(self.head, BlockWeight):
            self.head.zero_rows(ids)
        else:
            self.head.index_fill_(0, ids, 0)
        if self.head_bias is None:
            self.head_bias = torch.full((self.vocab_size,), -0.0, dtype=torch.float32, device=self.device)
        self.head_bias.index_fill_(0, ids, -torch.inf)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer, or None if there is none.

        Raises:
            ValueError: its file is broken, or it would have to be downloaded and cannot be.
        """
        return self.load_tokenizer()

    @cached_property
    def chat_template(self) -> ChatTemplate | None:
        """The chat template, or None if there is none.

        Raises:
            ValueError: its file is broken.
        """
        return self.load_chat_template()

    def chat_prompt(
        self, messages: Sequence[Mapping[str, object]], *, add_generation_prompt: bool = True, **variables: object
    ) -> list[int]:
        """Token ids of a conversation, written as the model's chat template has it.

        Args:
            messages: dicts with ``role`` and ``content``, as transformers and OpenAI have them. Special tokens in a
                content are read as such.
            add_generation_prompt: end with what begins an answer.
            variables: others that the template knows, such as ``tools`` or ``enable_thinking``.

        Raises:
            ValueError: the model has no chat template or no tokenizer; messages or variables are of the wrong kind; the
                template refuses them, or is broken.
        """
        if self.chat_template is None:
            raise ValueError(
                f"{self.name} has no chat template (chat_template.jinja, or chat_template in tokenizer_config.json); "
                "put one into its folder, or give it plain text"
            )
        text = self.chat_template.render(messages, add_generation_prompt=add_generation_prompt, **variables)
        return encode(text_tokenizer(self), text, special_tokens=False)

    @property
    def default_sampling(self) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends, as far as it states it; greedy without ``do_sample``.

        Raises:
            ValueError: a value there is out of range, or calls for another way to generate.
        """
        return default_sampling(self.generation_config)

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def activation_dtype(self) -> torch.dtype:
        """What flows between layers: with the GPU's kernels as the weights, or as the norm's if they are blocks."""
        if self.backend not in ("cuda", "triton"):
            return torch.float32
        return (self.norm_weight if isinstance(self.embedding, BlockWeight) else self.embedding).dtype

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def eos_token_id(self) -> int | tuple[int, ...] | None:
        return self.config.eos_token_id

    @property
    def mixers(self) -> list[Mixer]:
        """Those of all blocks, one after the other."""
        return [mixer for block in self.blocks for mixer in block.mixers]

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights that a step of one token reads: of experts those that it chooses.

        A pass over T tokens reads every expert that one of them chooses, up to T times as many."""
        unread = sum(mixer.unread_bytes for mixer in self.mixers if isinstance(mixer, Experts))
        return sum(weight.nbytes for weight in self.weights()) - unread

    def weights(self) -> Iterator[torch.Tensor | BlockWeight]:
        """Those that steps read, all experts among them; of the embedding a step reads a few rows."""
        yield from (self.norm_weight, self.head)
        if self.head_bias is not None:
            yield self.head_bias
        for block in self.blocks:
            yield block.norm_weight
        for mixer in self.mixers:
            for value in vars(mixer).values():
                value = value.matrices if isinstance(value, ExpertWeight) else value
                values = value if isinstance(value, tuple) else (value,)
                yield from (weight for weight in values if isinstance(weight, torch.Tensor | BlockWeight))

    def new_cache(self, batch: int, slots: int) -> ModelCache:
        """An empty cache for ``batch`` rows whose windows have up to ``slots`` tokens. It grows with the texts where
        there are attention layers; ``reserve`` makes it grow at once."""
        sizes = CacheSizes(batch, slots, self.state_dtype, self.rollback)
        return ModelCache(mixer.new_cache(sizes) for mixer in self.mixers if mixer.stateful)

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int], cache: list[LayerCache], row: int) -> None:
        """Absorbs a row's first tokens into its slot 0, which must hold a fresh state. Without gradients.

        Time and memory are linear in the number of tokens: a chunk at a time. Every token goes through the same
        kernels in the same order as in ``verify``, so the state has the same bits however the tokens are cut.

        Raises:
            ValueError: they are no token ids.
        """
        self._check_files()
        attention = [layer for layer in cache if isinstance(layer, AttentionCache)]
        if attention:
            length = int(attention[0].lengths[row, 0]) + len(tokens)
            self.reserve(cache, length)
            for layer in attention:
                layer.at_most = max(layer.at_most, length)
        one_row = [layer.row(row) for layer in cache]
        window = Window(
            torch.zeros(1, dtype=torch.int32, device=self.device), final_state_only=True, fused=self.fused_layers
        )
        if not len(tokens):
            return
        ids = _as_ids(tokens)
        for chunk in token_ids(ids, self.embedding.shape[0]).to(self.device).split(self._prefill_chunk()):
            self.read_part(chunk[None], one_row, window)

    def read_part(self, tokens: torch.Tensor, cache: list[LayerCache], window: Window) -> None:
        """Tokens (B, T) int64 that change the cache of B rows and make no logits. Calls ops alone."""
        self._blocks(self._embed(tokens), len(tokens), cache, window)

    def _prefill_chunk(self) -> int:
        by_tiles = self.backend == "cpu" and self.embedding.dtype == torch.bfloat16 and has_tiles()
        return PREFILL_CHUNK_OF_TILES if by_tiles else PREFILL_CHUNK

    def verify(
        self,
        tokens: torch.Tensor,
        cache: list[LayerCache],
        start_slot: torch.Tensor,
        write_slot: int = 0,
        left_padding: torch.Tensor | None = None,
        *,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs a window of tokens and checkpoints the state after each.

        tokens: (B, T) of any integer dtype. start_slot: (B) int32, the slot each row continues from. The state after
        token t goes to slot ``write_slot + t``. left_padding: (B) int32 or None, leading tokens of a row that count as
        nothing. hidden_states: (B, T, d) of any float dtype, or None; **written**: the residual stream after the last
        block and the last norm, from which the head makes the logits; it is computed in ``activation_dtype``.
        Returns logits (B, T, V) float32, without gradients.

        Raises:
            ValueError: the cache belongs to a model of another depth, the window does not fit into its slots, a file in
                which weights lie was changed, or on the CPU, where that is cheap to check, a token is not of the
                vocabulary; hidden_states has another shape.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self.verify(tokens, cache, start_slot, write_slot, left_padding, hidden_states=hidden_states)
        recorded = self.recordable and isinstance(cache, ModelCache)
        if tokens.ndim != 2:
            raise ValueError(f"tokens must have shape (B, T), got {tuple(tokens.shape)}")
        if hidden_states is not None and hidden_states.shape != (*tokens.shape, self.config.d_model):
            expected = (*tokens.shape, self.config.d_model)
            raise ValueError(f"hidden_states must have shape {expected}, got {tuple(hidden_states.shape)}")
        if not is_recording():
            every = 0.0 if not recorded or cache.watches_model else _FILES_ARE_LOOKED_AT_EVERY
            self.before_step(cache, tokens.shape[1], files_every=every)
        window = Window(start_slot, write_slot, left_padding, fused=self.fused_layers)
        tokens = token_ids(tokens, self.embedding.shape[0])
        tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
        if recorded:
            logits, normed = self._run_recorded(tokens, cache, window)
        else:
            self._check_depth(cache)
            logits, normed = self._logits(tokens, cache, window)
        if hidden_states is not None:
            hidden_states.copy_(normed.view(hidden_states.shape))
        return logits.view(*tokens.shape, -1)

    def _check_depth(self, cache: list[LayerCache]) -> None:
        stateful = sum(mixer.stateful for mixer in self.mixers)
        if len(cache) != stateful:
            raise ValueError(f"the cache has {len(cache)} layers, the model {stateful}; use model.new_cache")

    @staticmethod
    def reserve(cache: list[LayerCache], entries: int) -> bool:
        """Makes memory for texts of so many tokens in every attention layer. Whether anything moved."""
        grown = [layer for layer in cache if isinstance(layer, AttentionCache) and layer.capacity < entries]
        if grown and isinstance(cache, ModelCache):
            cache.steps.clear()  # they work on the tensors from before
        for layer in grown:
            layer.grow(grown_capacity(entries))
        return bool(grown)

    def before_step(
        self, cache: list[LayerCache], tokens: int, *, files_every: float = _FILES_ARE_LOOKED_AT_EVERY
    ) -> list[int]:
        """What a step does before its kernels, recorded or not: sees that no file was changed, unless it was looked
        at so many seconds ago, and makes memory for so many more tokens. Lengths are read only where their bound says
        that it may be needed. Returns where the keys lie: a step that was recorded on others is stale.

        Raises:
            ValueError: a file in which weights lie was changed.
        """
        self._check_files(files_every)
        attention = [layer for layer in cache if isinstance(layer, AttentionCache)]
        for layer in attention:
            if layer.may_overflow(tokens):
                self.reserve(cache, layer.at_most)
        return [layer.keys.data_ptr() for layer in attention]

    @property
    def recordable(self) -> bool:
        """Whether steps can be recorded: they are made of compiled kernels."""
        return self.backend in ("cpu", "cuda")

    @property
    def step_kind(self) -> tuple:
        """Steps of equal kinds call the same ops, whatever lies in the weights."""
        return self.backend, self.rollback, self.fused_layers, *map(type, self.mixers)

    def _check_files(self, every: float = 0.0) -> None:
        for file in self.files:
            file.check(every=every)

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """tokens (B, T) int64 → rows of the embedding (B·T, d) in ``activation_dtype``."""
        table, dtype = self.embedding, self.activation_dtype
        if not isinstance(table, BlockWeight):
            return embed_tokens(tokens, table, out_dtype=dtype, backend=self.backend)
        hidden = new_result(self.norm_weight, tokens.numel(), self.config.d_model, dtype=dtype)
        torch_op(lambda: hidden.copy_(table.rows(tokens.reshape(-1))))
        return hidden

    def _blocks(
        self, hidden: torch.Tensor, batch: int, cache: list[LayerCache], window: Window
    ) -> tuple[Summands, torch.Tensor | None]:
        summands, residual, caches = [(hidden, self.config.embedding_multiplier)], None, iter(cache)
        for block in self.blocks:
            summands, residual = block(summands, residual, batch, caches, window)
            next_stage()
        return summands, residual

    def _logits(
        self, tokens: torch.Tensor, cache: list[LayerCache], window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits (B·T, V), and the normed residual stream (B·T, d) that they are made from."""
        summands, residual = self._blocks(self._embed(tokens), len(tokens), cache, window)
        normed, _ = add_and_norm(summands, residual, self.norm_weight, self.config.eps, self.backend)
        logits = skinny_linear(
            normed, self.head, self.head_bias, y_scale=1 / self.config.logits_scaling, out_dtype=torch.float32,
            backend=self.backend,
        )  # fmt: skip
        return logits, normed

    def _run_recorded(
        self, tokens: torch.Tensor, cache: ModelCache, window: Window
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``_logits``, without Python between the kernels from the second call of a shape on."""
        key = (id(self), *tokens.shape, window.write_slot, window.left_padding is None)
        # A window that begins in slot 0 looks whether the model is what it was; its further steps rely on that.
        step, looks = cache.steps.get(key), cache.watches_model and window.write_slot == 0
        if looks or step is None:
            self._check_depth(cache)
            parts = self._parts(cache)
        else:
            parts = step.model
        if cache:  # a model of MLPs alone has no state
            check_start_slot(window.start_slot, cache[0].slots, tokens.shape[0], self.norm_weight)
        if window.write_slot and any(isinstance(layer, MambaCache) and layer.inputs is not None for layer in cache):
            check_follows(window.start_slot, window.write_slot)
        if step is not None and (step.model is parts or _are_same(step.model, parts)):
            step.tokens.copy_(tokens)
            step.window.start_slot.copy_(window.start_slot)
            if window.left_padding is not None:
                step.window.left_padding.copy_(window.left_padding)
            try:
                step.recording.run(unchanged=not looks)
                return step.results.copy(step.logits), step.normed
            except StaleRecordingError:
                pass
        if step is not None:  # it and others of this model hold memory that may be in use nowhere else
            cache.steps = {other: steps for other, steps in cache.steps.items() if other[0] != id(self)}
        padding = None if window.left_padding is None else window.left_padding.clone()
        own = replace(window, start_slot=window.start_slot.clone(), left_padding=padding)
        own_tokens = tokens.clone()
        kind = *key[1:], *self.step_kind
        weights = (part for part in parts if isinstance(part, torch.Tensor | BlockWeight))
        (logits, normed), recording = record(
            self.norm_weight, self._logits, own_tokens, cache, own, relied_on=weights, known=kind in self._recorded
        )
        self._recorded.add(kind)
        cache.steps[key] = _RecordedStep(parts, own_tokens, own, recording, logits, normed)
        return logits.clone(), normed

    def _parts(self, cache: ModelCache) -> list[object]:
        """All that a step is made from. Whether a tensor has the same memory as before, the recording knows."""
        parts = [self, *vars(self).values()]
        for block in self.blocks:
            parts += (block, *vars(block).values())
        for mixer in self.mixers:
            parts += vars(mixer).values()
        for layer in cache:
            parts += layer.tensors()
        return parts
