"""Measures what the dtype of the recurrent state does to the embedded target's logits on text it has not seen.

python -m benchmarks.drift [--tokens 4096] [--json FILE]

The errors are against the same weights in float64: the largest error as a share of the largest logit, and the root mean
square of the errors as a share of that of the logits. same_token: positions whose likeliest token is float64's.
"""

import dataclasses
import json
import math
from importlib import resources

import torch

import speculative_mamba as sm
from speculative_mamba.models.checkpoint import DTYPES
from speculative_mamba.testing import oracle

from .report import parser

WINDOW = 256


def logits(model: sm.MambaLM, ids: torch.Tensor) -> torch.Tensor:
    """Logits (L, V) after every token of a text that is read once, from its start."""
    cache = model.new_cache(1, WINDOW)
    start, out = torch.zeros(1, dtype=torch.int32), []
    for window in ids.split(WINDOW):
        out.append(model.verify(window[None], cache, start)[0])
        start.fill_(len(window) - 1)
    return torch.cat(out).double()


def compare(state_dtype: str, actual: torch.Tensor, exact: torch.Tensor, ids: torch.Tensor) -> dict:
    nats = -torch.log_softmax(actual[:-1], -1).gather(1, ids[1:, None]).mean().item()
    error = actual - exact
    return {
        "state_dtype": state_dtype,
        "tokens": len(ids),
        "bits_per_byte": nats / math.log(2),
        "max_error": (error.abs().max() / exact.abs().max()).item(),
        "rms_error": (error.norm() / exact.norm()).item(),
        "same_token": (actual.argmax(-1) == exact.argmax(-1)).double().mean().item(),
    }


def main() -> None:
    arguments = parser(__doc__.splitlines()[0])
    arguments.add_argument("--tokens", type=int, default=4096, help="length of the text (default: %(default)s)")
    options = arguments.parse_args()
    text = resources.files("speculative_mamba.models.builtin").joinpath("heldout.txt").read_bytes()
    if not 2 <= options.tokens <= len(text):
        arguments.error(f"--tokens must be from 2 to {len(text)}, the length of the text")
    ids = torch.tensor(list(text[: options.tokens]))
    model = sm.load_model("builtin:target")
    exact = oracle.full_forward(model, ids.tolist())
    print(f"{len(ids)} bytes of unseen text, against float64 in every operation")
    print(f"{'state_dtype':>11}  bits_per_byte  max_error  rms_error  same_token")
    rows = []
    for name, dtype in {"float64": None, **DTYPES}.items():
        actual = exact if dtype is None else logits(dataclasses.replace(model, state_dtype=dtype), ids)
        row = compare(name, actual, exact, ids)
        rows.append(row)
        print(
            f"{name:>11}  {row['bits_per_byte']:13.6f}  {row['max_error']:9.1e}  {row['rms_error']:9.1e}  "
            f"{row['same_token'] * 100:8.2f} %",
            flush=True,
        )
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
