"""Gives damaged checkpoints to load_model, and generates with those that load.

    python tests/models/fuzz.py 10000 [seed]

Every refusal must be a ValueError of one line that names the file or its folder. Anything else ends the program with
the exit code 1, a hang of ``SECONDS`` and a crash with another; the last line says where the checkpoint is kept. Memory
is bounded, to ``MEMORY`` above what the program has before it starts.
"""

import copy
import faulthandler
import json
import os
import resource
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from fuzz_corpus import write_corpus
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

import speculative_mamba as sm
from speculative_mamba.models.text import TextStream
from speculative_mamba.models.tokenizer import encode

MEMORY = 2**29  # bytes
SECONDS = 20
LONGEST = 800  # characters of a message
ODD = (
    None, True, False, 0, -1, 1, 2, 3, 1.5, -0.0, 1e-300, 1e308, float("nan"), float("inf"), 2**24, 2**31, 2**63,
    2**64, 10**400, "", "x", "\0", "\ud800", "é" * 3000, "../../x", "F32", "I64", "mamba", "mamba2", "BPE", [],
    {}, [[]], [0, 2**40], [-1, 4], [0] * 500, ["x"], {"": 0}, {"type": "x"},
)  # fmt: skip
values = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=8)


def damaged_json(draw: Callable, content: bytes) -> bytes:
    """Some values of a JSON document are others, gone, new, or in another place."""
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = document, None
        while isinstance(parent, dict | list) and parent:
            keys = list(parent) if isinstance(parent, dict) else range(len(parent))
            key = draw(st.sampled_from(keys))
            if not isinstance(parent[key], dict | list) or not parent[key] or draw(st.integers(0, 3)) == 0:
                break
            parent = parent[key]
        if key is None:
            return json.dumps(draw(values)).encode()
        how = draw(st.sampled_from(("other", "other", "gone", "new", "moved")))
        if how == "gone":
            del parent[key]
        elif how == "other":
            parent[key] = copy.deepcopy(draw(values))
        elif isinstance(parent, list):
            parent.insert(key, copy.deepcopy(parent[key] if how == "moved" else draw(values)))
        elif how == "new":
            parent[draw(st.text(max_size=5))] = copy.deepcopy(draw(values))
        else:
            parent[key] = copy.deepcopy(parent[draw(st.sampled_from(list(parent)))])
    return json.dumps(document).encode()


def damaged_bytes(draw: Callable, content: bytes) -> bytes:
    """A piece is gone, doubled, or other bytes."""
    begin = draw(st.integers(0, len(content)))
    end = min(len(content), begin + draw(st.sampled_from((0, 1, 1, 1, 2, 8, 100, 2**30))))
    piece = draw(st.one_of(st.just(b""), st.just(2 * content[begin:end]), st.binary(max_size=8)))
    return content[:begin] + piece + content[end:]


def damaged_safetensors(draw: Callable, content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + size], content[8 + size :]
    damage = draw(st.sampled_from((damaged_json, damaged_json, damaged_bytes, None)))
    if damage is None:
        size = draw(st.sampled_from((0, 1, size - 1, size + 1, 2**20, 2**27, 2**40, 2**63, 2**64 - 1)))
    else:
        header = damage(draw, header)
        size = len(header)
    return size.to_bytes(8, "little") + header + data


DAMAGES = {
    ".json": (damaged_json, damaged_json, damaged_json, damaged_bytes),
    ".safetensors": (damaged_safetensors, damaged_safetensors, damaged_bytes),
}


def use(source: Path) -> None:
    """Everything that reads a file of a checkpoint."""
    try:
        model = sm.load_model(source)
        sampling, tokenizer, template = model.default_sampling, model.tokenizer, model.chat_template
    except ValueError as error:
        assert any(name in str(error) for name in (str(source), "_config.json")), f"no file is named: {error}"
        raise
    sm.generate(model, [[0], [1, 2, 3]], max_new_tokens=3)
    sm.generate(model, [[1]], max_new_tokens=2, sampling=sampling)
    if tokenizer is not None:
        stream = TextStream(tokenizer)
        for token in encode(tokenizer, "a text é"):
            stream.push(token)
        if template is not None:
            model.chat_prompt([{"role": "user", "content": "a"}])


def check(source: Path) -> str:
    """Whether the checkpoint is "used" or "refused".

    Raises:
        AssertionError: the checkpoint is refused, but not as it should be.
    """
    try:
        use(source)
        return "used"
    except ValueError as error:
        message = str(error)
        assert type(error) is ValueError, f"a {type(error).__name__} is raised: {message}"
        assert message.isprintable() and len(message) <= LONGEST, f"no short line: {message!a}"
        return "refused"


def main(count: int, random_seed: int) -> None:
    torch.set_num_threads(1)
    root = Path(tempfile.mkdtemp(prefix="fuzz-"))
    sources = write_corpus(root)
    files = list(sources)
    # Threads, pools and caches that last are there before memory is counted.
    for source in dict.fromkeys(sources.values()):
        use(source)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    by_name = {
        name: st.sampled_from([file for file in files if file.name == name])
        for name in sorted({file.name for file in files})
    }
    chosen = st.sampled_from(files) | st.sampled_from(list(by_name)).flatmap(by_name.get)
    outcomes = Counter()

    @seed(random_seed)
    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def fuzz(data: st.DataObject) -> None:
        file = data.draw(chosen)
        content = file.read_bytes()
        damage = data.draw(st.sampled_from(DAMAGES.get(file.suffix, (damaged_bytes,))))
        replace(file, damage(data.draw, content))
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        try:
            outcomes[check(sources[file])] += 1
        except BaseException:
            shutil.copytree(file.parent, root / "failed", dirs_exist_ok=True)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
            replace(file, content)

    faulthandler.enable()
    print(f"{root} is kept if this fails", flush=True)
    fuzz()
    shutil.rmtree(root)
    print(f"{outcomes.total()} damaged checkpoints, seed {random_seed}: {dict(outcomes)}")


def replace(file: Path, content: bytes) -> None:
    """By another file of its name, since the old one may still be mapped."""
    new = file.with_name("new")
    new.write_bytes(content)
    new.rename(file)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if sys.argv[2:] else 0)
