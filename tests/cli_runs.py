"""A short run of the command line, and what it prints."""

import speculative_mamba as sm

PROMPT = "She had not"
SHORT = ["--prompt", PROMPT, "--n_tokens_to_generate", "12"]


def generated(prompt: str = PROMPT, tokens: int = 12) -> str:
    """The text that the Python interface gives for the same run."""
    target = sm.load_model("builtin:target")
    ids = target.tokenizer.encode(prompt).ids
    sequence = sm.generate(target, [ids], max_new_tokens=tokens).sequences[0].tolist()
    return target.tokenizer.decode(sequence)
