"""Speculative decoding for models of transformers, within their own ``generate``.

    python examples/transformers_generate.py [target [draft [prompt]]]

Any two causal language models with the same tokens, of an architecture that ``load_model`` reads.
"""

import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

from speculative_mamba.integrations.transformers import speculative_generate


def main(
    target: str = "state-spaces/mamba-2.8b-hf",
    draft: str = "state-spaces/mamba-130m-hf",
    prompt: str = "It is a truth universally acknowledged, that",
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    model, small = (AutoModelForCausalLM.from_pretrained(name, dtype="auto").eval() for name in (target, draft))
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"max_new_tokens": 48, "do_sample": False}

    began = time.perf_counter()
    plain = model.generate(**inputs, **options)
    between = time.perf_counter()
    fast = model.generate(**inputs, **options, custom_generate=speculative_generate, draft=small)
    print(f"plain {between - began:.2f} s, with a draft {time.perf_counter() - between:.2f} s")
    print(f"the same text: {torch.equal(plain, fast)}")

    set_seed(1)
    sampled = {"max_new_tokens": 48, "do_sample": True, "temperature": 0.8, "top_p": 0.9}
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    model.generate(**inputs, **sampled, streamer=streamer, custom_generate=speculative_generate, draft=small)


if __name__ == "__main__":
    main(*sys.argv[1:])
