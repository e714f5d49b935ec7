"""The tokenizer of a GGUF file, made from its metadata."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from ...ops.values import shown
from ..chat import ChatTemplate
from ..formats.fields import is_integer
from .header import Value

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5
_SPACE = "▁"  # of SentencePiece
# Ids that end a text: those with a key of their own, and by llama.cpp's example those that end a turn by their name.
_ENDS = ("eos", "eot", "eom")
_TURN_ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")
_SPECIALS = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SHORTENED = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class _Kind:
    """How text is cut before bytes are merged. split: a pattern of pieces; None: GPT-2's. digits: how they are cut
    beside GPT-2's pattern. nfc: Unicode is composed first. whole_pieces: a piece that is a token is not merged.
    adds_bos: unless the file says otherwise."""

    split: str | None = None
    digits: str = ""
    nfc: bool = False
    whole_pieces: bool = False
    adds_bos: bool = False


_GPT2, _NEOX, _DIGIT = _Kind(), _Kind(nfc=True), _Kind(digits="one by one")
_LLAMA3 = rf"{_SHORTENED}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORTENED}|{_WORDS}|\p{{N}}|{_REST}"
_LLAMA_BPE = _Kind(_LLAMA3, whole_pieces=True, adds_bos=True)
# By the names that llama.cpp gives to what comes before byte-pair encoding.
_KINDS = {
    **dict.fromkeys(("gpt-2", "phi-2", "jais", "trillion", "granite-docling"), _GPT2),
    **dict.fromkeys(("mpt", "olmo", "gpt-neox", "dolma"), _NEOX),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "lfm2", "midm-2.0"), _LLAMA_BPE),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), _Kind(_LLAMA3)),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), _DIGIT),
    **dict.fromkeys(("qwen2", "stablelm2", "megrez", "deepseek-r1-qwen"), _Kind(_QWEN2, nfc=True)),
    **dict.fromkeys(("tekken", "pixtral"), _Kind(_CASED, whole_pieces=True, adds_bos=True)),
    "falcon": _Kind(digits="in threes"),
}  # fmt: skip


@dataclass(frozen=True)
class GgufVocabulary:
    """What the metadata of a file say of its tokens."""

    path: Path
    values: Mapping[str, Value]

    def tokens(self) -> dict[int, str] | None:
        """Tokens by id without those that stand for nothing; None if the file has none.

        Raises:
            ValueError: tokens or their types are no such lists.
        """
        if "tokenizer.ggml.tokens" not in self.values:
            return None
        return {i: text for i, (text, kind) in enumerate(zip(self._texts, self._types, strict=True)) if kind != _UNUSED}

    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text.

        Raises:
            ValueError: one is no token.
        """
        ids = [self._special(name) for name in _ENDS]
        if "tokenizer.ggml.tokens" in self.values:
            tokens = enumerate(zip(self._texts, self._types, strict=True))
            ids += [i for i, (text, kind) in tokens if kind == _CONTROL and text in _TURN_ENDS]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    def tokenizer(self) -> Tokenizer | None:
        """None if the file has no tokens.

        Raises:
            ValueError: it is of an unknown kind, or broken.
        """
        if "tokenizer.ggml.tokens" not in self.values:
            return None
        kind = self.values.get("tokenizer.ggml.model")
        makers = {"gpt2": self._byte_level, "llama": self._sentence_piece}
        if not isinstance(kind, str) or kind not in makers:
            raise self._broken(f"tokenizer.ggml.model {shown(kind)} is not supported (gpt2 and llama are)")
        try:
            tokenizer = makers[kind]()
            self._add_special_tokens(tokenizer)
        except ValueError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise self._broken(f"its tokenizer is broken: {error}") from None
        return tokenizer

    def chat_template(self) -> ChatTemplate | None:
        """
        Raises:
            ValueError: a template is no text.
        """
        key = "tokenizer.chat_template"
        sources = {
            name.removeprefix(f"{key}."): text for name, text in self.values.items() if name.startswith(f"{key}.")
        }
        sources |= {"default": self.values[key]} if key in self.values else {}
        if not all(isinstance(text, str) for text in sources.values()):
            raise self._broken(f"{key} must be a text")
        specials = {name: self._special(key) for key, name in _SPECIALS.items()}
        tokens = {name: self._texts[i] for name, i in specials.items() if i is not None}
        return ChatTemplate(self.path, sources, tokens) if sources else None

    @cached_property
    def _texts(self) -> list[str]:
        return self._list("tokens", str)

    @cached_property
    def _types(self) -> list[int]:
        if "tokenizer.ggml.token_type" not in self.values:
            return [_NORMAL] * len(self._texts)
        return self._list("token_type", int, len(self._texts))

    def _list(self, name: str, kind: type, length: int | None = None) -> list:
        values = self.values.get(f"tokenizer.ggml.{name}")
        if not isinstance(values, list) or not all(type(value) is kind for value in values):
            raise self._broken(f"tokenizer.ggml.{name} must be a list of {kind.__name__}")
        if length is not None and len(values) != length:
            raise self._broken(f"tokenizer.ggml.{name} has {len(values)} entries for {length} tokens")
        return values

    def _special(self, name: str) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        token = self.values.get(key)
        if token is not None and not (is_integer(token) and 0 <= token < 2**32):
            raise self._broken(f"{key} is {shown(token)}; a token id is needed")
        # Conversions write ids that are no tokens for those that a model lacks.
        count = len(self._texts) if "tokenizer.ggml.tokens" in self.values else 2**31
        return token if token is not None and token < count else None

    def _flag(self, name: str, default: bool) -> bool:
        value = self.values.get(f"tokenizer.ggml.{name}", default)
        if not isinstance(value, bool):
            raise self._broken(f"tokenizer.ggml.{name} is {shown(value)}; true or false is needed")
        return value

    def _ids(self) -> dict[str, int]:
        """The id of each token."""
        ids: dict[str, int] = {}
        for token, text in self.tokens().items():
            if text in ids:
                raise self._broken(f"tokens {ids[text]} and {token} are both {shown(text)}")
            ids[text] = token
        return ids

    def _byte_level(self) -> Tokenizer:
        """Byte-pair encoding of bytes that are written as letters."""
        name = self.values.get("tokenizer.ggml.pre")
        if not isinstance(name, str) or name not in _KINDS:
            raise self._broken(f"tokenizer.ggml.pre {shown(name)} is not supported ({', '.join(_KINDS)})")
        kind, merges = _KINDS[name], self._list("merges", str)
        pairs = [(merge[:at], merge[at + 1 :]) for merge in merges if (at := merge.find(" ", 1)) > 0]
        if len(pairs) != len(merges):
            raise self._broken("tokenizer.ggml.merges must be pairs of texts")
        tokenizer = Tokenizer(models.BPE(self._ids(), pairs, ignore_merges=kind.whole_pieces))
        if kind.nfc:
            tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = _pre_tokenizer(kind)
        tokenizer.decoder = decoders.ByteLevel()
        self._surround(tokenizer, self._flag("add_bos_token", kind.adds_bos))
        return tokenizer

    def _sentence_piece(self) -> Tokenizer:
        """Byte-pair encoding as SentencePiece does it: two pieces are merged where they make a token, those of the best
        score first; a character that is no token is spelled in bytes."""
        ids = self._ids()
        scores = dict(zip(self._texts, self._list("scores", float, len(self._texts)), strict=True))
        plain = [text for text, kind in zip(self._texts, self._types, strict=True) if kind == _NORMAL]
        if len({scores[text] for text in plain if len(text) > 1}) < 2 < len(plain):
            raise self._broken("the scores of its tokens are all the same, so that the order of merges is lost")
        unknown = next((text for text, kind in zip(self._texts, self._types, strict=True) if kind == _UNKNOWN), None)
        pairs = _merges(plain, ids, scores)
        tokenizer = Tokenizer(models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=True))
        begins_with_space = self._flag("add_space_prefix", True)
        steps = [normalizers.Prepend(_SPACE)] if begins_with_space else []
        tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
        steps = [decoders.Strip(" ", 1, 0)] if begins_with_space else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *steps]
        )
        self._surround(tokenizer, self._flag("add_bos_token", True))
        return tokenizer

    def _add_special_tokens(self, tokenizer: Tokenizer) -> None:
        for kind, special in ((_CONTROL, True), (_UNKNOWN, True), (_USER_DEFINED, False)):
            texts = [text for text, its in zip(self._texts, self._types, strict=True) if its == kind]
            tokenizer.add_tokens([AddedToken(text, special=special, normalized=False) for text in texts if text])

    def _surround(self, tokenizer: Tokenizer, adds_bos: bool) -> None:
        """Special tokens around a text."""
        wanted = ("bos", adds_bos), ("eos", self._flag("add_eos_token", False))
        ids = {name: self._special(name) if adds else None for name, adds in wanted}
        begin, end = ([] if ids[name] is None else [name] for name in ("bos", "eos"))
        if begin or end:
            specials = [(name, ids[name]) for name in (*begin, *end)]
            around = [*begin, "$A", *end]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=" ".join(around), pair=" ".join([*around, *begin, "$B:1", *end]), special_tokens=specials
            )

    def _broken(self, what: str) -> ValueError:
        return ValueError(f"{self.path}: {what}; token ids can be used without text")


def _pre_tokenizer(kind: _Kind) -> pre_tokenizers.PreTokenizer:
    if kind.split is not None:
        split = pre_tokenizers.Split(Regex(kind.split), "isolated")
        return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if kind.digits == "one by one":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    if kind.digits == "in threes":
        threes = pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated")
        punctuation = pre_tokenizers.Punctuation("contiguous")
        return pre_tokenizers.Sequence([punctuation, words, pre_tokenizers.Digits(), threes])
    return words


def _merges(plain: Sequence[str], ids: Mapping[str, int], scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Pairs of tokens that make a token, the best first."""
    pairs = [
        (-scores[text], ids[text[:at]], ids[text[at:]], text[:at], text[at:])
        for text in plain
        for at in range(1, len(text))
        if text[:at] in ids and text[at:] in ids
    ]
    return [(left, right) for *_, left, right in sorted(pairs)]
