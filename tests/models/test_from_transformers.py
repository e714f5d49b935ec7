"""Models of transformers that are in memory: the same bits as from their files, in the same memory; what is refused."""

import copy
import gc
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from published import FORMATS, random_hugging_face_model

import speculative_mamba as sm
from speculative_mamba.testing.text import byte_level_tokenizer
from speculative_mamba.testing.tolerance import assert_bitwise_equal

transformers = pytest.importorskip("transformers")
IDS = [5, 9, 33, 2, 60, 17, 41, 8]


def logits(model: sm.MambaLM) -> torch.Tensor:
    return model.verify(torch.tensor([IDS]), model.new_cache(1, len(IDS)), torch.zeros(1, dtype=torch.int32))


def storages(tensors: Any) -> set[int]:
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def parts(model: sm.MambaLM) -> list[torch.Tensor]:
    return [model.embedding, *model.weights()]


PUBLISHED = [name for name in FORMATS if name.endswith("-hf")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PUBLISHED)
def test_the_bits_of_the_files_in_the_memory_of_the_model(name, dtype, tmp_path):
    """Catches: names of Nemotron-H and of experts in memory; a copy where none is needed."""
    model = FORMATS[name](tmp_path, 3).model
    if dtype is not torch.float32:
        model = model.to(dtype)
        model.save_pretrained(tmp_path)
    shared = sm.from_transformers(model)
    assert shared.config == sm.load_model(tmp_path).config and shared.embedding.dtype is dtype
    assert_bitwise_equal(logits(shared), logits(sm.load_model(tmp_path)), "logits")
    matrices = {
        path: weight
        for path, weight in model.named_parameters()
        if ".experts." in path or (path.endswith("weight") and weight.ndim == 2)
    }
    apart = [path for path, weight in matrices.items() if not storages([weight]) <= storages(parts(shared))]
    assert len(matrices) > 4 and not apart


def test_mamba_with_other_options():
    model = random_hugging_face_model(tie_word_embeddings=True)
    shared = sm.from_transformers(model, state_dtype="float16", rollback="replay", backend="reference")
    assert shared.head is shared.embedding and shared.embedding.data_ptr() == model.lm_head.weight.data_ptr()
    assert (shared.state_dtype, shared.rollback, shared.backend) == (torch.float16, "replay", "reference")
    assert not shared.embedding.requires_grad


@pytest.mark.parametrize("dtype", ["bfloat16", "q8_0"])
def test_another_dtype_is_a_copy_and_the_model_stays(dtype, tmp_path):
    """Catches: pages given back that no file can fill again."""
    model = random_hugging_face_model(hidden_size=64, vocab_size=512)
    model.save_pretrained(tmp_path)
    before = copy.deepcopy(model.state_dict())
    shared = sm.from_transformers(model, dtype=dtype)
    for name, weight in model.state_dict().items():
        assert_bitwise_equal(weight, before[name], name)
    assert_bitwise_equal(logits(shared), logits(sm.load_model(tmp_path, dtype=dtype)), "logits")


def retrained(model: Any) -> None:
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log.add_(0.1)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "retrained": retrained,
    "converted": lambda model: model.to(torch.bfloat16),
    "loaded": lambda model: model.load_state_dict(model.state_dict()),
    "replaced": lambda model: setattr(model.lm_head, "weight", torch.nn.Parameter(torch.zeros(64, 24))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_done_to_the_model_is_noticed(change):
    model = random_hugging_face_model()
    shared = sm.from_transformers(model)
    sm.generate(shared, [IDS], max_new_tokens=3)
    CHANGES[change](model)
    with pytest.raises(ValueError, match="MambaForCausalLM were changed, moved or converted since") as error:
        sm.generate(shared, [IDS], max_new_tokens=3)
    assert "\n" not in str(error.value)
    sm.generate(sm.from_transformers(model), [IDS], max_new_tokens=3)


def test_it_needs_the_model_no_more():
    model = random_hugging_face_model()
    shared = sm.from_transformers(model)
    expected = logits(shared)
    copies = [copy.deepcopy(shared), pickle.loads(pickle.dumps(shared)), copy.copy(shared)]
    del model
    gc.collect()
    for one in (shared, *copies):
        assert_bitwise_equal(logits(one), expected, "logits")


def test_generation_config_and_tokens_that_end_a_text():
    model = random_hugging_face_model()
    model.generation_config = transformers.GenerationConfig(
        do_sample=True, temperature=0.7, top_k=9, top_p=0.8, eos_token_id=[3, 4]
    )
    shared = sm.from_transformers(model)
    assert shared.eos_token_id == (0, 3, 4)
    assert shared.default_sampling == sm.SamplingParams(temperature=0.7, top_k=9, top_p=0.8)


def tokenizer_of_transformers() -> Any:
    """256 byte tokens and three special ones."""
    backend = byte_level_tokenizer(["<bos>", "<eos>", "<pad>"])
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **names)


def test_tokenizers_of_transformers():
    tokenizer = tokenizer_of_transformers()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    tokenizer(["a", "bcd"], padding=True)  # leaves padding switched on
    model = random_hugging_face_model(vocab_size=270, eos_token_id=257)
    head = model.lm_head.weight.detach().clone()
    shared = sm.from_transformers(model, tokenizer=tokenizer)
    assert shared.vocab_size == 259 and shared.tokenizer.encode("abc").ids == tokenizer("abc").input_ids
    assert shared.tokenizer.padding is None
    messages = [{"role": "user", "content": "hello"}]
    assert shared.chat_prompt(messages) == tokenizer.apply_chat_template(messages, return_dict=False)
    assert_bitwise_equal(model.lm_head.weight, head, "the model's head")
    pickle.loads(pickle.dumps(shared))


def test_ids_that_the_tokenizer_lacks_are_impossible_and_the_model_stays():
    backend = byte_level_tokenizer()
    vocabulary = json.loads(backend.to_str())
    del vocabulary["model"]["vocab"]["a"]
    tokenizer = type(backend).from_str(json.dumps(vocabulary))
    model = random_hugging_face_model(vocab_size=256)
    head = model.lm_head.weight.detach().clone()
    shared = sm.from_transformers(model, tokenizer=tokenizer)
    [unused] = shared.vocabulary.unused
    assert (logits(shared)[..., unused] == -torch.inf).all()
    assert_bitwise_equal(model.lm_head.weight, head, "the model's head")


def test_a_forward_that_was_put_back_is_none():
    """As hooks of accelerate leave it when they are removed."""
    model = random_hugging_face_model()
    model.backbone.norm_f.forward = model.backbone.norm_f.forward
    sm.from_transformers(model)


def test_hidden_states_may_have_been_recorded():
    """For which transformers leaves hooks of its own."""
    model = random_hugging_face_model()
    model(torch.tensor([IDS]), output_hidden_states=True)
    sm.from_transformers(model)


def changed(**attributes: Any) -> Any:
    model = random_hugging_face_model()
    for name, value in attributes.items():
        setattr(model, name, value)
    return model


def with_hook(kind: str) -> Any:
    model = random_hugging_face_model()
    getattr(model.backbone.layers[0], kind)(lambda *arguments: None)
    return model


def with_accelerate() -> Any:
    model = random_hugging_face_model()
    model.backbone.layers[0].mixer._hf_hook = object()
    return model


def compiled() -> Any:
    """As torch.compile leaves it, which takes seconds to import."""
    wrapper = type("OptimizedModule", (torch.nn.Module,), {})()
    wrapper._orig_mod = random_hugging_face_model()
    return wrapper


def offloaded() -> Any:
    model = on_meta()
    model.backbone._hf_hook = object()
    return model


def with_forward() -> Any:
    model = random_hugging_face_model()
    model.backbone.norm_f.forward = lambda hidden: hidden
    return model


def with_adapters() -> Any:
    model = random_hugging_face_model()
    adapter = type("LoraModel", (torch.nn.Linear,), {"__module__": "peft.tuners.lora"})
    model.backbone.layers[0].mixer.in_proj = adapter(24, 96, bias=False).eval()
    return model


def with_weight(weight: torch.nn.Parameter) -> Any:
    model = random_hugging_face_model()
    model.backbone.layers[0].mixer.in_proj.weight = weight
    return model


def of_class(name: str, module: str) -> Any:
    model = random_hugging_face_model()
    model.__class__ = type(name, (type(model),), {"__module__": module})
    return model


def on_meta() -> Any:
    with torch.device("meta"):
        return transformers.MambaForCausalLM(transformers.MambaConfig(hidden_size=8, num_hidden_layers=1)).eval()


Params4bit = type("Params4bit", (torch.nn.Parameter,), {})
REFUSED = [
    (lambda: changed(training=True), "is in training mode; call model.eval()"),
    (compiled, "OptimizedModule is compiled"),
    (lambda: changed(_compiled_call_impl=len), "is compiled (torch.compile)"),
    (lambda: with_hook("register_forward_hook"), "MambaForCausalLM.backbone.layers.0 has forward hooks"),
    (lambda: with_hook("register_forward_pre_hook"), "has forward hooks"),
    (with_accelerate, "MambaForCausalLM.backbone.layers.0.mixer has a hook of accelerate"),
    (with_forward, "backbone.norm_f has another forward"),
    (with_adapters, "has adapters (LoraModel of peft); merge them"),
    (lambda: changed(is_quantized=True, quantization_method="bitsandbytes"), "is quantised (bitsandbytes)"),
    (lambda: with_weight(Params4bit(torch.zeros(96, 24))), "in_proj.weight as Params4bit"),
    (lambda: with_weight(torch.nn.Parameter(torch.zeros(96, 23))), "has shape (96, 23), but its config gives (96, 24)"),
    (offloaded, "MambaForCausalLM is offloaded; load it to one device"),
    (on_meta, "has no weights: backbone.embeddings.weight is on the meta device"),
    (lambda: changed(hf_device_map={"backbone": 0, "lm_head": "disk"}), "is offloaded (0, disk)"),
    (lambda: of_class("MyMamba", "transformers.models"), "architecture ['MyMamba'] of model_type 'mamba'"),
    (lambda: of_class("MambaForCausalLM", "my_module"), "is no class of transformers"),
    (lambda: random_hugging_face_model().backbone, "architecture ['MambaModel'] of model_type 'mamba'"),
    (lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=8, n_layer=1, n_head=1)).eval(), "'gpt2'"),
    (lambda: torch.nn.Linear(2, 2).eval(), "Linear is no class of transformers"),
    (lambda: "state-spaces/mamba-130m", "takes a model of transformers, such as MambaForCausalLM, got 'state-spaces"),
    (lambda: None, "got NoneType"),
    (lambda: random_hugging_face_model(hidden_act="gelu"), "hidden_act"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_refused(make, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sm.from_transformers(make())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"state_dtype": "int8"}, "unknown state_dtype 'int8'"),
        ({"rollback": 3}, "unknown rollback 3"),
        ({"backend": "tpu"}, "tpu"),
        ({"tokenizer": "tokenizer.json"}, "a tokenizer must be a tokenizers.Tokenizer or a fast one"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        sm.from_transformers(random_hugging_face_model(), **options)
    assert "\n" not in str(error.value)


def test_load_model_names_it():
    with pytest.raises(ValueError, match="got MambaForCausalLM; from_transformers takes models"):
        sm.load_model(random_hugging_face_model())
