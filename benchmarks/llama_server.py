"""llama.cpp's own server on the same random weights, for ``benchmarks.serve``."""

import contextlib
import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import speculative_mamba as sm
from speculative_mamba.ops.threads import num_threads
from speculative_mamba.testing.gguf_files import write_gguf

from .peer_files import write_checkpoint

_PATIENCE_S = 600.0


class LlamaServer:
    """A running server with so many slots, asked over HTTP with a connection per request."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def served(self, requests: list[sm.Request]) -> list[int]:
        """How many tokens came for each; all are asked for at once."""
        with ThreadPoolExecutor(len(requests)) as clients:
            return list(clients.map(self._complete, requests))

    def _complete(self, request: sm.Request) -> int:
        body = {
            "prompt": list(request.prompt), "n_predict": request.max_new_tokens, "temperature": 0, "ignore_eos": True,
            "cache_prompt": False,
        }  # fmt: skip
        asked = urllib.request.Request(
            f"{self._url}/completion", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(asked, timeout=_PATIENCE_S) as answer:
            return json.load(answer)["tokens_predicted"]

    def wait(self, process: subprocess.Popen) -> None:
        """
        Raises:
            SystemExit: the server ends, or does not get ready.
        """
        for _ in range(int(_PATIENCE_S)):
            with contextlib.suppress(urllib.error.URLError, ConnectionError):
                urllib.request.urlopen(f"{self._url}/health", timeout=5).close()
                return
            if process.poll() is not None:
                break
            time.sleep(1)
        raise SystemExit("llama-server does not start on this file")


def write_file(model: sm.MambaLM, folder: Path) -> Path:
    """Its matrices in bf16, and a piece of text for every id."""
    checkpoint = folder / "checkpoint"
    write_checkpoint(model, checkpoint)
    count = model.vocab_size
    tokenizer = {
        "tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [f"{chr(0x2581)}{at}" for at in range(count)],
        "tokenizer.ggml.scores": [0.0] * count, "tokenizer.ggml.token_type": [1] * count,
        "tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 0, "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }  # fmt: skip

    return write_gguf(checkpoint, folder / "model.gguf", "BF16", metadata=tokenizer)


@contextlib.contextmanager
def running(binary: Path, file: Path, slots: int, tokens: int, port: int) -> Iterator[LlamaServer]:
    """tokens: of the longest text."""
    command = [
        binary, "--model", file, "--port", port, "--parallel", slots, "--ctx-size", slots * (tokens + 64), "--threads",
        num_threads(), "--threads-batch", num_threads(), "--no-webui", "--log-disable",
    ]  # fmt: skip
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
        try:
            server = LlamaServer(port)
            server.wait(process)
            yield server
        finally:
            process.kill()
            process.wait()
