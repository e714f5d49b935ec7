"""Measures what the dtype of the recurrent state, or of the weights, does to logits on text that is new to the model.

python -m benchmarks.drift [--weights] [--tokens 4096] [--json FILE]

With --weights, of the embedded target and of a random model of the 130m shape, which reads random tokens.
The errors are against the same weights in float64: the largest error as a share of the largest logit, and the root mean
square of the errors as a share of that of the logits. same_token: positions whose likeliest token is float64's. A
token of the embedded target is a byte.
"""

import dataclasses
import itertools
import json
import math
from collections.abc import Iterable
from importlib import resources

import torch

import speculative_mamba as sm
from speculative_mamba.models.checkpoint import WEIGHT_DTYPES
from speculative_mamba.models.sources import FLOAT_DTYPES
from speculative_mamba.testing import oracle
from speculative_mamba.testing.models import published_config, random_model

from .report import parser, progress

WINDOW = 256
RANDOM_TOKENS = 256


def logits(model: sm.MambaLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (L, V) after every token of a text that is read once, from its start."""
    cache = model.new_cache(1, WINDOW)
    start, out = torch.zeros(1, dtype=torch.int32), []
    for window in ids.split(WINDOW):
        out.append(model.verify(window[None], cache, start)[0])
        start.fill_(len(window) - 1)
    return torch.cat(out).double()


def compare(actual: torch.Tensor, exact: torch.Tensor, ids: torch.Tensor) -> dict:
    nats = -torch.log_softmax(actual[:-1], -1).gather(1, ids[1:, None]).mean().item()
    error = actual - exact
    return {
        "tokens": len(ids),
        "bits_per_token": nats / math.log(2),
        "max_error": (error.abs().max() / exact.abs().max()).item(),
        "rms_error": (error.norm() / exact.norm()).item(),
        "same_token": (actual.argmax(-1) == exact.argmax(-1)).double().mean().item(),
    }


def table(what: str, exact: torch.Tensor, ids: torch.Tensor, actual: Iterable[tuple[str, torch.Tensor]]) -> list[dict]:
    """Prints and returns a row for float64 and for each of the named logits."""
    print(f"{what:>13}  bits_per_token  max_error  rms_error  same_token")
    rows = []
    for name, values in itertools.chain([("float64", exact)], actual):
        rows.append({what: name, **compare(values, exact, ids)})
        row = rows[-1]
        print(
            f"{name:>13}  {row['bits_per_token']:14.6f}  {row['max_error']:9.1e}  {row['rms_error']:9.1e}  "
            f"{row['same_token'] * 100:8.2f} %",
            flush=True,
        )
    return rows


def random_130m() -> list[dict]:
    config = dataclasses.replace(published_config("130m"), tie_embeddings=False)
    ids = torch.randint(0, config.vocab_size, (RANDOM_TOKENS,), generator=torch.Generator().manual_seed(0))
    print(f"a random model of the 130m shape, {RANDOM_TOKENS} random tokens, against its float32 weights in float64")
    progress("the exact logits")
    exact = oracle.full_forward(random_model(config), ids.tolist())
    models = ((name, random_model(config, dtype=dtype)) for name, dtype in WEIGHT_DTYPES.items())
    rows = table("weights", exact, ids, ((name, logits(model, ids)) for name, model in models))
    return [{"model": "random 130m", **row} for row in rows]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=4096, help="length of the text (default: %(default)s)")
    arguments.add_argument("--weights", action="store_true", help="compare dtypes of the weights, not of the state")
    options = arguments.parse_args()
    text = resources.files("speculative_mamba.models.builtin").joinpath("heldout.txt").read_bytes()
    if not 2 <= options.tokens <= len(text):
        arguments.error(f"--tokens must be from 2 to {len(text)}, the length of the text")
    ids = torch.tensor(list(text[: options.tokens]))
    model = sm.load_model("builtin:target")
    progress("the exact logits")
    exact = oracle.full_forward(model, ids.tolist())
    print(f"{len(ids)} bytes of unseen text, against the stored weights with float64 in every operation")
    if options.weights:
        models = ((name, sm.load_model("builtin:target", dtype=name)) for name in WEIGHT_DTYPES)
        rows = table("weights", exact, ids, ((name, logits(other, ids)) for name, other in models))
        rows = [{"model": "builtin:target", **row} for row in rows] + random_130m()
    else:
        models = ((name, dataclasses.replace(model, state_dtype=dtype)) for name, dtype in FLOAT_DTYPES.items())
        rows = table("state_dtype", exact, ids, ((name, logits(other, ids)) for name, other in models))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
