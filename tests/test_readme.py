"""The README's Python examples run, in order and in one namespace, and do what their comments say."""

import re
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba import cli
from speculative_mamba.testing.tolerance import assert_bitwise_equal

README = Path(__file__).parent.parent / "README.md"


@pytest.fixture(scope="module")
def text():
    return README.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def examples(text):
    blocks = re.findall(r"^```python\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) >= 2
    return blocks


def test_the_examples_run(examples, capsys):
    generator = torch.get_rng_state()
    names = {}
    for number, block in enumerate(examples):
        exec(compile(block, f"README.md, Python example {number + 1}", "exec"), names)
    assert isinstance(names["result"], sm.GenerationResult) and capsys.readouterr().out
    assert torch.equal(torch.get_rng_state(), generator), "no global generator is touched"


def test_the_state_is_explicit_and_goes_back(examples, capsys):
    """The example's own claim: after going back, the same bits as above; and any number of tokens per call."""
    names = {}
    for block in examples:
        before = names.get("logits")
        exec(block, names)
    target, prompts = names["target"], names["prompts"]
    ids, start = torch.tensor([prompts[0][:8]]), torch.zeros(1, dtype=torch.int32)
    whole = target.verify(ids, target.new_cache(batch=1, slots=8), start)
    if before is None:
        assert_bitwise_equal(names["logits"], whole[:, 3:5], "after going back")
    for count in range(1, 9):
        cache = target.new_cache(batch=1, slots=8)
        parts, done, slot = [], 0, 0
        while done < 8:
            part = ids[:, done : done + count]
            start[:] = slot
            parts.append(target.verify(part, cache, start))
            done, slot = done + part.shape[1], part.shape[1] - 1
        assert_bitwise_equal(torch.cat(parts, 1), whole, f"{count} tokens per call")


def test_the_table_of_options_is_complete(text):
    """Every option of the program is in the README, and the README names no other."""
    table = text.split("| option |")[1].split("\n\n")[0]
    named = set(re.findall(r"--([A-Za-z_]+)", table))
    actions = {action.option_strings[0][2:]: action for action in cli.build_parser()._actions if action.dest != "help"}
    assert named == set(actions)


def test_the_commands_parse(text):
    commands = re.findall(
        r"^(?:speculative-mamba|python speculative_mamba/run\.py)((?: .*| *\\\n)*)$", text, re.MULTILINE
    )
    assert len(commands) >= 3
    for command in commands:
        words = re.sub(r"#.*", "", command).replace("\\", " ").split()
        if words[:1] != ["info"]:
            flags = [word for word in words if word.startswith("--")]
            known = {name for action in cli.build_parser()._actions for name in action.option_strings}
            assert set(flags) <= known, command
