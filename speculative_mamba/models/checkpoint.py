"""From a folder, a GGUF file, a hub id, the embedded pair or a model of transformers to a model."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..ops import backend as backends
from ..ops.values import shown
from .builder import build
from .chat import ChatTemplate, chat_template_of, read_chat_template
from .config import ModelConfig
from .folders import GENERATION_CONFIG, download, fetch_weights, find_model, read_configs
from .formats import Names, parse_config
from .formats.fields import with_eos_token_ids
from .gguf import GgufFile
from .in_memory import SharedWeights, check_model, config_of, tensors_of
from .language_model import ROLLBACKS, MambaLM
from .sources import FLOAT_DTYPES, QUANTIZED, CountingSource, HeaderSource, StoredSource, check_format
from .tokenizer import clean_copy, load_tokenizer
from .vocabulary import Vocabulary, check_same_vocabulary, read_tokens, tokens_of, vocabulary_of
from .weights import StoredTensor, read_tensors

WEIGHT_DTYPES = {**FLOAT_DTYPES, **{name: name for name in QUANTIZED}}


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    state_dtype: str | torch.dtype | None = None,
    rollback: str = "auto",
    device: str | torch.device = "cpu",
    backend: str = "auto",
    mmap: bool = True,
    revision: str | None = None,
    on_load: Callable[[str, float], None] | None = None,
) -> MambaLM:
    """Loads a language model: Mamba-1, Mamba-2, Falcon-Mamba, Llama, or a hybrid of Mamba and attention.

    Args:
        source: ``"builtin:target"`` or ``"builtin:draft"``, a folder, a GGUF file of llama.cpp (``"model.gguf"``, which
            holds all that belongs to a model), or a hub id (``"state-spaces/mamba-2.8b"``). A folder holds
            ``config.json`` and weights in state-spaces format (``pytorch_model.bin``; also Mamba-2 and
            ``mamba2attn``) or Hugging Face format (``model.safetensors``, also sharded; ``MambaForCausalLM``,
            ``Mamba2ForCausalLM``, ``FalconMambaForCausalLM``, ``LlamaForCausalLM``, or with ``mamba_config.json`` a
            hybrid of *The Mamba in the Llama*), and for text ``tokenizer.json``. Ids that end a text are those of
            ``config.json`` and of ``generation_config.json``. Ids that the tokenizer lacks, or that without one lie
            beyond the stated size, are padding: no text can hold them.
        dtype: ``"float32"``, ``"bfloat16"``, ``"float16"``, ``"q8_0"`` or ``"q4_0"`` for the weights; None keeps the
            stored one, which needs no copy: the weights stay in the mapped file. With the last two the matrices and the
            embedding are rounded to GGUF's blocks of 32 features with a scale, one by one, and the rest keeps its
            stored dtype, as do matrices whose width is no multiple of 32. A, D and the dt bias are float32 always, as
            is all arithmetic.
        state_dtype: the first three for the recurrent state, which is rounded after every token, and for cached keys
            and values; None is float32, whatever the weights are. Half the memory, but errors add up over the text, and
            a float16 state beyond 65504 becomes infinite.
        rollback: how a Mamba layer can go back to any token of a window: ``"snapshots"`` keeps the state after each,
            ``"replay"`` one state and each token's inputs, and computes again what was accepted. Text and logits are
            the same bit for bit; ``"auto"`` takes what is faster for the model and the batch.
        device: ``"cpu"`` or ``"cuda"``.
        backend: ``"auto"``, ``"cpu"`` (C++ kernels), ``"cuda"`` (CUDA C++), ``"triton"`` or ``"reference"`` (PyTorch).
            With the two for GPUs activations have the dtype of the weights, with the others they are float32.
        mmap: False copies the weights into memory. Until it is copied, and as long as it is mapped, a file must stay as
            it is: one that is written over or cut short is noticed when the model is next called, but not within a
            call, where a cut ends the process (bus error). Deleting it, or renaming another file over it, does no harm.
        revision: of a hub id, the branch, tag or commit to take; None is the newest commit.
        on_load: called as ``on_load(source, share)`` when a weight is there, with the share of all that are, 0 to 1.

    Raises:
        ValueError: anything in the list above is missing, broken, unknown, or does not fit the rest. Names, shapes and
            dtypes of all tensors are checked before any weights are read.
    """
    options = _Options.of(dtype, state_dtype, rollback, device, backend, mmap)
    return _Checkpoint.open(source, revision).load(options, on_load)


def load_pair(
    target: str | Path,
    draft: str | Path,
    *,
    revision: str | None = None,
    revision_draft: str | None = None,
    on_load: Callable[[str, float], None] | None = None,
    **options: object,
) -> tuple[MambaLM, MambaLM]:
    """A target and its draft, as ``load_model`` loads each; their vocabularies are compared before any weights are
    downloaded or read. ``revision`` is the target's, ``revision_draft`` the draft's.

    Raises:
        ValueError: as ``load_model``, or the draft's tokens are not the target's.
    """
    parsed = _Options.of(**options)
    pair = _Checkpoint.open(target, revision), _Checkpoint.open(draft, revision_draft)
    check_same_vocabulary(*(checkpoint.vocabulary for checkpoint in pair))
    return pair[0].load(parsed, on_load), pair[1].load(parsed, on_load)


def from_transformers(
    model: torch.nn.Module,
    *,
    tokenizer: object = None,
    dtype: str | torch.dtype | None = None,
    state_dtype: str | torch.dtype | None = None,
    rollback: str = "auto",
    backend: str = "auto",
) -> MambaLM:
    """A model of transformers that is in memory, of every architecture that ``load_model`` reads, on its device.

    Its weights are shared, not copied, but for those that have another dtype here: A, D, the dt bias and other biases
    are float32. So what is written into the others later would be used with what was computed from the first before;
    the next call says so (what is written through ``.data`` nobody notices), and says it too if the model was moved or
    converted meanwhile. A model that nobody else holds any more stays as it is.

    Args:
        model: in evaluation mode, such as ``MambaForCausalLM``; its ``generation_config`` is taken over too.
        tokenizer: for text, a fast one of transformers or a ``tokenizers.Tokenizer``, of which a copy is made, without
            padding and truncation; with its chat template. Ids that it lacks are impossible; without one all are text.
        dtype: None keeps the model's, which needs no copy.
        state_dtype: as of ``load_model``.
        rollback: as of ``load_model``.
        backend: as of ``load_model``.

    Raises:
        ValueError: the model is of another class; it is compiled, in training mode, quantised, offloaded, on the meta
            device or on several; it has hooks or adapters; or an argument is out of range.
    """
    check_model(model)
    device = next(model.parameters()).device
    options = _Options.of(dtype, state_dtype, rollback, device, backend)
    shared = SharedWeights(model)
    converted = _Checkpoint.of_model(model, tokenizer).load(options)
    converted.files = (shared,)
    return converted


@dataclass(frozen=True)
class _Options:
    """The arguments of ``load_model`` after they were checked."""

    dtype: torch.dtype | str | None
    state_dtype: torch.dtype
    rollback: str
    device: torch.device
    backend: str
    mmap: bool

    @staticmethod
    def of(
        dtype: object = None,
        state_dtype: object = None,
        rollback: object = "auto",
        device: object = "cpu",
        backend: object = "auto",
        mmap: object = True,
    ) -> "_Options":
        dtype = parse_dtype(dtype, "dtype", WEIGHT_DTYPES)
        state_dtype = parse_dtype(state_dtype, "state_dtype", FLOAT_DTYPES) or torch.float32
        if not isinstance(rollback, str) or rollback not in ROLLBACKS:
            raise ValueError(f"unknown rollback {shown(rollback)}; choose from: {', '.join(ROLLBACKS)}")
        if not isinstance(mmap, bool):
            raise ValueError(f"mmap must be True or False, got {shown(mmap)}")
        device = parse_device(device)
        if not isinstance(backend, str):
            raise ValueError(f"unknown backend {shown(backend)}; choose from: auto, {', '.join(backends.BACKENDS)}")
        return _Options(dtype, state_dtype, rollback, device, backends.resolve(backend, device.type), mmap)


@dataclass
class _Checkpoint:
    """A model's files, of which all but the weights have been read. path: its folder, its GGUF file, or what else its
    tensors are in. described_by: where what it is like is written. read: its tensors, which a hub id downloads first.
    in_memory: they are somebody else's."""

    source: str
    path: Path | str
    described_by: str
    config: ModelConfig
    names: Names
    vocabulary: Vocabulary
    read: Callable[[], dict[str, StoredTensor]]
    load_tokenizer: Callable[[], Tokenizer | None]
    load_chat_template: Callable[[], ChatTemplate | None]
    generation_config: dict
    tokenizer: Tokenizer | None = None  # that has been loaded
    in_memory: bool = False

    @staticmethod
    def open(source: str | Path, revision: str | None) -> "_Checkpoint":
        path, is_hub = find_model(source, revision)
        return _Checkpoint._of_file(source, path) if path.is_file() else _Checkpoint._of_folder(source, path, is_hub)

    @staticmethod
    def _of_folder(source: str | Path, folder: Path, is_hub: bool) -> "_Checkpoint":
        config, mamba_config, generation_config = read_configs(folder)
        try:
            config = with_eos_token_ids(config, generation_config, GENERATION_CONFIG)
            parsed, names = parse_config(config, mamba_config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder}: {error}") from None
        try:
            tokenizer = load_tokenizer(folder, False, download)
        except ValueError:
            tokenizer = None  # said when text is first needed
        parsed, vocabulary = _with_vocabulary(parsed, None if tokenizer is None else read_tokens(folder, tokenizer))
        # State-spaces checkpoints come without the tokenizer they were trained with, gpt-neox-20b's.
        falls_back = "model_type" not in config or (is_hub and config["model_type"] == "mamba")

        def read() -> dict[str, StoredTensor]:
            if is_hub:
                fetch_weights(str(source), folder)
            return read_tensors(folder)

        return _Checkpoint(
            source=str(source),
            path=folder,
            described_by="config.json",
            config=parsed,
            names=names,
            vocabulary=vocabulary,
            read=read,
            load_tokenizer=partial(load_tokenizer, folder, falls_back, download),
            load_chat_template=_Known.of(partial(read_chat_template, folder)),
            generation_config=generation_config,
            tokenizer=tokenizer,
        )

    @staticmethod
    def _of_file(source: str | Path, path: Path) -> "_Checkpoint":
        gguf = GgufFile.open(path)
        config, vocabulary = _with_vocabulary(gguf.description.config, gguf.vocabulary.tokens())
        return _Checkpoint(
            source=str(source),
            path=path,
            described_by="its metadata",
            config=config,
            names=gguf.description.names,
            vocabulary=vocabulary,
            read=gguf.tensors,
            load_tokenizer=gguf.vocabulary.tokenizer,
            load_chat_template=gguf.vocabulary.chat_template,
            generation_config={},
        )

    @staticmethod
    def of_model(model: torch.nn.Module, tokenizer: object) -> "_Checkpoint":
        kind, generation_config = type(model).__name__, config_of(getattr(model, "generation_config", None))
        own = None if tokenizer is None else clean_copy(tokenizer)
        try:
            config = config_of(model.config) | {"architectures": [kind]}
            parsed, names = parse_config(with_eos_token_ids(config, generation_config, "generation_config"))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{kind}: {error}") from None
        parsed, vocabulary = _with_vocabulary(parsed, None if own is None else tokens_of(own))
        return _Checkpoint(
            source=model.config.name_or_path or kind,
            path=kind,
            described_by="its config",
            config=parsed,
            names=names,
            vocabulary=vocabulary,
            read=partial(tensors_of, model, names),
            load_tokenizer=_Known(own),
            load_chat_template=partial(chat_template_of, tokenizer),
            generation_config=generation_config,
            tokenizer=own,
            in_memory=True,
        )

    def load(self, options: _Options, on_load: Callable[[str, float], None] | None = None) -> MambaLM:
        stored = self.read()
        check_format(self.path, stored, options.dtype)
        headers = HeaderSource(self.path, stored, self.described_by)
        asked = CountingSource(headers)
        build(self.config, self.names, asked, "reference")
        headers.refuse_others()
        source = StoredSource(self.path, stored, options.dtype, options.device, options.mmap)

        def tell(elements: int) -> None:
            if on_load is not None:
                on_load(self.source, min(elements / asked.elements, 1.0))

        model = build(self.config, self.names, CountingSource(source, tell), options.backend)
        for file in {stored.file for stored in stored.values()} - {None}:
            file.check()
        model.name, model.state_dtype, model.rollback = self.source, options.state_dtype, options.rollback
        model.files = tuple(source.mapped.values())
        model.vocabulary = self.vocabulary
        model.forbid(self.vocabulary.unused, copy=self.in_memory)
        model.load_tokenizer, model.load_chat_template = self.load_tokenizer, self.load_chat_template
        model.generation_config = self.generation_config
        if self.tokenizer is not None:
            model.tokenizer = self.tokenizer
        return model


@dataclass(frozen=True)
class _Known:
    """A function that can be pickled, of which the result, or the error that it raises, is known already."""

    value: object
    error: str | None = None

    @staticmethod
    def of(read: Callable[[], object]) -> "_Known":
        try:
            return _Known(read())
        except ValueError as error:
            return _Known(None, str(error))

    def __call__(self) -> object:
        if self.error is not None:
            raise ValueError(self.error)
        return self.value


def _with_vocabulary(config: ModelConfig, tokens: dict[int, str] | None) -> tuple[ModelConfig, Vocabulary]:
    """A config whose ids are those of the tokens, and what they mean."""
    vocabulary = vocabulary_of(tokens, config.vocab_size, config.stored_vocab_size, config.eos_token_ids)
    rows = config.stored_vocab_size
    padded = rows if rows > vocabulary.size else None
    return dataclasses.replace(config, vocab_size=vocabulary.size, padded_vocab_size=padded), vocabulary


def parse_dtype(dtype: object, name: str, known: dict[str, torch.dtype | str]) -> torch.dtype | str | None:
    if dtype is None or (isinstance(dtype, torch.dtype) and dtype in known.values()):
        return dtype
    if not isinstance(dtype, str) or dtype not in known:
        value = dtype if isinstance(dtype, str | torch.dtype) else shown(dtype)
        raise ValueError(f"unknown {name} '{value}'; choose from: {', '.join(known)}")
    return known[dtype]


def parse_device(device: object) -> torch.device:
    try:
        parsed = torch.device(device) if isinstance(device, str | torch.device) else None
    except RuntimeError:
        parsed = None
    if parsed is None:
        raise ValueError(f"unknown device '{device!s:.60}'; choose from: cpu, cuda")
    if parsed.type not in ("cpu", "cuda"):
        raise ValueError(f"device '{device}' is not supported; choose from: cpu, cuda")
    if parsed.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' was asked for, but torch sees no CUDA device; use device cpu")
    if parsed.type == "cuda" and parsed.index is not None and parsed.index >= torch.cuda.device_count():
        raise ValueError(f"device '{device}' does not exist; torch sees {torch.cuda.device_count()} CUDA devices")
    return parsed
