"""A local Ray with two workers, one of which is killed in mid-run: every row and every call gets its own text.

The environment variable SPECULATIVE_MAMBA_KILLS says how many workers of a dataset are killed, one after the other.
"""

import concurrent.futures
import json
import os
import random
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import speculative_mamba as sm
from speculative_mamba.integrations.engine_args import EngineArgs
from speculative_mamba.integrations.ray_data import TextGenerator, generate_texts
from speculative_mamba.integrations.ray_serve import build_application

PROMPTS = ["She had not", "It was", "Mr. Darcy", "The rain", "A", "You are very kind", "In the morning,", "No one"]
KILLS = int(os.environ.get("SPECULATIVE_MAMBA_KILLS", "1"))


@pytest.fixture(scope="module")
def texts():
    """texts(prompt, tokens): the greedy text of a prompt, generated alone."""
    target = sm.load_model("builtin:target")
    known = {}

    def text(prompt, tokens):
        if (prompt, tokens) not in known:
            ids = target.tokenizer.encode(prompt).ids
            new = sm.generate(target, [ids], max_new_tokens=tokens).sequences[0].tolist()[len(ids) :]
            known[prompt, tokens] = target.tokenizer.decode(new)
        return known[prompt, tokens]

    return text


@pytest.fixture(scope="module")
def cluster():
    ray = pytest.importorskip("ray", reason="the extra [ray] is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(sm.__file__).parents[1]))
        ray.init(
            num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, logging_level="ERROR",
            log_to_driver=False,
        )  # fmt: skip
        yield ray
        ray.shutdown()


def workers(kind):
    """Process ids of this cluster's workers whose title holds a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            if title.startswith("ray::") and kind in title and os.getpid() in ancestors(int(folder.name)):
                found.append(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def ancestors(process):
    while process > 1:
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        yield process


def test_rows_of_a_dataset(texts):
    """Without a cluster: fields, defaults, other columns, rows that are refused."""
    generator = TextGenerator(EngineArgs(max_batch_size=2), ("prompt", "max_tokens", "n"), {"temperature": 0})
    batch = {
        "prompt": np.array([*PROMPTS[:3], None], dtype=object), "max_tokens": np.array([3, 9, 0, 4]),
        "n": np.array([None, 2, None, None], dtype=object), "name": np.array(["a", "b", "c", "d"]),
    }  # fmt: skip
    made = generator(batch)
    assert set(made) == {"prompt", "max_tokens", "n", "name", "text", "finish_reason", "completion_tokens", "error"}
    assert made["name"].tolist() == ["a", "b", "c", "d"]
    assert made["text"].tolist() == [texts(PROMPTS[0], 3), texts(PROMPTS[1], 9), None, None]
    assert made["finish_reason"].tolist() == ["length", "length", None, None]
    assert made["completion_tokens"].tolist() == [3, 18, 0, 0]
    assert made["error"].tolist()[:2] == [None, None] and "max_tokens" in made["error"][2]
    assert "prompt is missing" in made["error"][3]
    assert all(len(column) == 0 for column in generator({name: values[:0] for name, values in batch.items()}).values())
    with pytest.raises(ValueError, match="no column n; it has prompt, max_tokens"):
        generator({"prompt": batch["prompt"], "max_tokens": batch["max_tokens"]})


def test_arguments_that_do_not_fit():
    for arguments, reason in (
        (EngineArgs(target="./absent"), "does not exist"),
        (EngineArgs(draft="guess"), "guess"),
        (EngineArgs(load={"dtype": "int3"}), "int3"),
        (EngineArgs(lookahead=16), "from 1 to 15"),
        (EngineArgs(max_batch_size=0), "max_batch_size"),
    ):
        with pytest.raises(ValueError, match=reason):
            arguments.start()


def test_a_dataset_survives_its_workers(cluster, texts):
    """Workers that are killed in mid-run: no row is lost, none comes twice, each has the text that it has alone."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    draw, count = random.Random(2), 96
    rows = [
        {"row": row, "prompt": PROMPTS[row % 8] * (1 + row % 3), "max_tokens": 20 + row % 29} for row in range(count)
    ]
    dataset = generate_texts(
        ray.data.from_items(rows, override_num_blocks=count // 2), EngineArgs(max_batch_size=2), workers=2,
        fields=("prompt", "max_tokens"), defaults={"temperature": 0}, batch_size=2,
    )  # fmt: skip
    moments = {count * (kill + 1) // (KILLS + 3) for kill in range(KILLS)}
    made, killed = [], []
    for row in dataset.iter_rows():
        made.append(row)
        if len(made) in moments:
            process = draw.choice(workers("MapWorker(MapBatches(TextGenerator))"))
            os.kill(process, signal.SIGKILL)
            killed.append(process)
    assert len(killed) == len(set(killed)) == KILLS
    assert sorted(row["row"] for row in made) == list(range(count))
    for row in made:
        assert row["text"] == texts(row["prompt"], row["max_tokens"]) and row["error"] is None


def ask(url, body, seconds=120):
    """The answer to a call, asked again while there is none."""
    deadline = time.monotonic() + seconds
    while True:
        call = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(call, timeout=60) as reply:
                return reply.read().decode()
        except (urllib.error.HTTPError, OSError) as error:
            if time.monotonic() > deadline or (isinstance(error, urllib.error.HTTPError) and error.code < 500):
                raise


def test_replicas_of_the_server(cluster, texts):
    """Calls go on being answered when a replica is killed; each answer is the text of its call alone."""
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    try:
        serve.run(build_application(EngineArgs(), replicas=2, num_cpus=0.5), name="test")
        url = f"http://127.0.0.1:{port}/v1/completions"
        replicas = workers("ServeReplica:test:speculative_mamba")
        assert len(replicas) == 2
        asked = [(PROMPTS[at % 8], 10 + at) for at in range(24)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            bodies = ({"prompt": prompt, "max_tokens": tokens, "temperature": 0} for prompt, tokens in asked)
            answers = [pool.submit(ask, url, body) for body in bodies]
            answers[5].result()
            os.kill(replicas[0], signal.SIGKILL)
            for (prompt, tokens), answer in zip(asked, answers, strict=True):
                assert json.loads(answer.result())["choices"][0]["text"] == texts(prompt, tokens)
        events = ask(url, {"prompt": "It was", "max_tokens": 12, "temperature": 0, "stream": True}).split("\n\n")
        pieces = [json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events[:-2]]
        assert "".join(pieces) == texts("It was", 12) and len(pieces) > 2 and events[-2] == "data: [DONE]"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            ask(url, {"prompt": "It was", "model": "gpt"})
    finally:
        serve.shutdown()
