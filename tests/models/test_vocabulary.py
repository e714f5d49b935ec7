"""Ids that no tokenizer has are no tokens, and a draft's tokens are the target's."""

import dataclasses
import json
import string
from pathlib import Path

import pytest
import torch
from published import FORMATS, VOCABULARY
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, models

import speculative_mamba as sm
from speculative_mamba.models.vocabulary import Vocabulary, vocabulary_of

CHARACTERS = (string.ascii_letters + string.digits + " .")[:VOCABULARY]
STATED = 57  # of 64
SAMPLED = sm.SamplingParams(temperature=1.0, seed=3)
state_spaces = pytest.mark.parametrize("name", ["mamba2-state-spaces", "mamba2attn-state-spaces"])


def write_tokenizer(folder: Path, vocabulary: dict[str, int], added: tuple[str, ...] = ()) -> None:
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in added])
    tokenizer.save(str(folder / "tokenizer.json"))


def ids_of(characters: str) -> dict[str, int]:
    return {character: i for i, character in enumerate(characters)}


def rewrite(folder: Path, change: object) -> None:
    """Changes the stored tensors, in whatever format they are."""
    [path] = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    pickled = path.suffix == ".bin"
    tensors = torch.load(path) if pickled else load_file(path)
    change(tensors)
    torch.save(tensors, path) if pickled else save_file(tensors, path)


def make_likely(ids: list[int] | slice, value: float = 9.0) -> object:
    """Rows of the head that win every draw, or that are no numbers."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        generator = torch.Generator().manual_seed(7)
        rows = tensors["lm_head.weight"][ids]
        tensors["lm_head.weight"][ids] = value * torch.randn(rows.shape, generator=generator)

    return change


def all_texts(folder: Path, **options: object) -> list[torch.Tensor]:
    """Greedy and sampled, plain and with itself as the draft."""
    model = sm.load_model(folder, **options)
    results = []
    for draft in (None, model, "ngram"):
        for sampling, acceptance in ((None, "rejection"), (SAMPLED, "rejection"), (SAMPLED, "coupled")):
            result = sm.generate(
                model, [[1, 2, 3], [4]], draft=draft, sampling=sampling, acceptance=acceptance, stop_token_ids=(),
                max_new_tokens=12,
            )  # fmt: skip
            results += result.sequences
    return results


@state_spaces
@pytest.mark.parametrize(("dtype", "value"), [(None, 9.0), (None, torch.nan), ("q8_0", 9.0)])
def test_rows_beyond_the_stated_size_are_never_drawn(name: str, dtype: str | None, value: float, tmp_path) -> None:
    FORMATS[name](tmp_path, 0, vocab_size=STATED, pad_vocab_size_multiple=16)
    rewrite(tmp_path, make_likely(slice(STATED, None), value))
    for text in all_texts(tmp_path, dtype=dtype):
        assert max(text) < STATED
    with pytest.raises(ValueError, match=f"token id {STATED} in row 0 is outside the vocabulary of {STATED} tokens"):
        sm.generate(sm.load_model(tmp_path), [[STATED]])


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize(
    ("known", "dtype"),
    [(range(STATED), "q4_0"), ([i for i in range(VOCABULARY) if i % 9 != 7], None)], ids=["short", "holes"],
)  # fmt: skip
def test_ids_that_the_tokenizer_lacks_are_never_drawn(name: str, known: list[int], dtype: str | None, tmp_path) -> None:
    """And the logits of the others keep their bits."""
    FORMATS[name](tmp_path, 0)
    before = sm.load_model(tmp_path, dtype=dtype)
    lacking = sorted(set(range(VOCABULARY)) - set(known))
    write_tokenizer(tmp_path, {CHARACTERS[i]: i for i in known})
    model = sm.load_model(tmp_path, dtype=dtype)
    ids, start = torch.tensor([[1, 2, 3, 5]]), torch.zeros(1, dtype=torch.int32)
    logits, expected = (m.verify(ids, m.new_cache(1, 4), start) for m in (model, before))
    assert torch.equal(logits[..., list(known)].view(torch.int32), expected[..., list(known)].view(torch.int32))
    assert model.vocab_size == max(known) + 1

    rewrite(tmp_path, make_likely(lacking))
    assert all(set(text.tolist()) <= set(known) for text in all_texts(tmp_path, dtype=dtype))
    with pytest.raises(ValueError, match=f"token id {lacking[0]} in row 0"):
        sm.generate(model, [[lacking[0]]])


def test_rows_of_padding_may_hold_anything(tmp_path: Path) -> None:
    FORMATS["llama-hf"](tmp_path, 0)
    write_tokenizer(tmp_path, {CHARACTERS[i]: i for i in range(VOCABULARY) if i != 5})
    stored = load_file(tmp_path / "model.safetensors")["lm_head.weight"][5].clone()
    rewrite(tmp_path, make_likely([5], torch.nan))
    assert all(5 not in text for text in all_texts(tmp_path))
    assert not load_file(tmp_path / "model.safetensors")["lm_head.weight"][5].equal(torch.zeros_like(stored))


@state_spaces
def test_tokens_that_a_tokenizer_puts_into_the_padding_are_tokens(name: str, tmp_path: Path) -> None:
    FORMATS[name](tmp_path, 0, vocab_size=STATED, pad_vocab_size_multiple=16)
    write_tokenizer(tmp_path, ids_of(CHARACTERS[:STATED]), ("<a>", "<b>"))
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"added_tokens_decoder": {str(STATED + 3): {"content": "<c>"}, "99": {"content": "<beyond>"}}})
    )
    rewrite(tmp_path, make_likely(slice(STATED, None)))
    new = set(torch.cat(all_texts(tmp_path)).tolist())
    assert {STATED, STATED + 1, STATED + 3} & new and STATED + 2 not in new and max(new) <= STATED + 3


def test_a_token_that_ends_the_text_is_one(tmp_path: Path) -> None:
    """Though the tokenizer does not know it."""
    FORMATS["llama-hf"](tmp_path, 0, eos_token_id=60)
    write_tokenizer(tmp_path, ids_of(CHARACTERS[:STATED]))
    rewrite(tmp_path, make_likely(slice(STATED, None)))
    model = sm.load_model(tmp_path)
    result = sm.generate(model, [[1, 2]], sampling=SAMPLED, max_new_tokens=200)
    assert result.finish_reasons == ["eos"] and result.sequences[0][-1] == 60
    assert set(result.sequences[0].tolist()) <= {*range(STATED), 60}


def test_vocabulary_of_a_tokenizer_of_another_model() -> None:
    assert vocabulary_of({90: "x"}, 57, 64, (2,)) == Vocabulary(57)
    assert vocabulary_of({0: "x", 90: "y"}, 57, 64, ()) == Vocabulary(1, ("x",))


def pair(tmp_path: Path, target: dict, draft: dict) -> tuple[Path, Path]:
    folders = tmp_path / "target", tmp_path / "draft"
    for seed, (folder, config) in enumerate(zip(folders, (target, draft), strict=True)):
        folder.mkdir()
        FORMATS["mamba2-state-spaces"](folder, seed, **config)
    return folders


def test_equal_vocabularies_that_are_padded_differently_fit(tmp_path: Path) -> None:
    target, draft = pair(tmp_path, {"vocab_size": STATED}, {"vocab_size": STATED, "pad_vocab_size_multiple": 1})
    rewrite(draft, lambda tensors: tensors.update(
        {name: tensor[:STATED].clone() for name, tensor in tensors.items() if len(tensor) == VOCABULARY}
    ))  # fmt: skip
    models = sm.load_pair(target, draft)
    plain, drafted = (sm.generate(models[0], [[1, 2]], draft=d, stop_token_ids=()) for d in (None, models[1]))
    assert torch.equal(plain.sequences[0], drafted.sequences[0])


@pytest.mark.parametrize(
    ("target", "draft", "words"),
    [
        ((57, None), (58, None), "58 and 57 tokens"),
        ((64, CHARACTERS), (64, CHARACTERS[::-1]), r"token 0 is '\.' and 'a'"),
        ((64, CHARACTERS), (64, CHARACTERS[:57]), "57 and 64 tokens"),
        ((57, None), (57, CHARACTERS[:56]), "56 and 57 tokens"),
    ],
)
def test_different_vocabularies_are_refused_before_weights_are_read(
    target, draft, words, tmp_path, monkeypatch
) -> None:
    folders = pair(tmp_path, {"vocab_size": target[0]}, {"vocab_size": draft[0]})
    for folder, (_, characters) in zip(folders, (target, draft), strict=True):
        if characters:
            write_tokenizer(folder, ids_of(characters))
    models = [sm.load_model(folder) for folder in folders]
    for reason in (lambda: sm.generate(models[0], [[1]], draft=models[1]), lambda: sm.load_pair(*folders)):
        with pytest.raises(ValueError, match=f"different vocabularies .*{words}") as caught:
            reason()
        assert "\n" not in str(caught.value)
        for folder in folders:
            (folder / "pytorch_model.bin").write_bytes(b"")


def test_tokens_that_only_one_of_two_has_do_not_part_them(tmp_path: Path) -> None:
    a, b = Vocabulary(3, ("x", None, "z")), Vocabulary(3, ("x", "y", "z"))
    assert a.difference(b) is None and b.difference(a) is None and a.difference(Vocabulary(3)) is None
    changed = dataclasses.replace(b, tokens=("x", "y", "w"))
    assert a.difference(changed) == "token 2 is 'w' and 'z'"
