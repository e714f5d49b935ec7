"""The Python examples of README.md and docs/ run and do what they say; commands, options and links are right."""

import re
from pathlib import Path

import pytest
import torch

import speculative_mamba as sm
from speculative_mamba.cli import batch, generate, serve
from speculative_mamba.cli.options import Parser, add_model_options, add_sampling_options
from speculative_mamba.testing.tolerance import assert_bitwise_equal

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").rglob("*.md"))]
WITH_RAY = {"generate_texts", "build_application"}  # tests/integrations runs them where Ray is installed
PARSERS = {"generate": generate.build_parser(), "serve": serve.build_parser(), "batch": batch.build_parser()}


def options(parser: Parser) -> set[str]:
    """Names without --, each in its first spelling."""
    named = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    return {action.option_strings[0][2:] for action in named}


def text(document: Path) -> str:
    return document.read_text(encoding="utf-8")


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(document), flags=re.MULTILINE | re.DOTALL)


def run(document: Path) -> dict[str, object]:
    """Runs the Python examples of a document in order; the names they leave."""
    names: dict[str, object] = {}
    for number, block in enumerate(blocks(document, "python")):
        exec(compile(block, f"{document.name}, Python example {number + 1}", "exec"), names)
    return names


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if blocks(path, "python")], ids=lambda path: path.name)
def test_the_examples_run(document, capsys):
    generator = torch.get_rng_state()
    names = run(document)
    if "from transformers" not in text(document):  # transformers draws numbers when it makes a model
        assert torch.equal(torch.get_rng_state(), generator), "no global generator is touched"
    if document == README:
        assert isinstance(names["result"], sm.GenerationResult) and capsys.readouterr().out


def test_the_reference_has_every_public_name_and_an_example_of_each():
    """``mkdocs build --strict`` asks whether what it names is there."""
    names = []
    for page in sorted((ROOT / "docs" / "api").glob("*.md")):
        here = re.findall(r"^::: speculative_mamba\..*\b(\w+)$", text(page), re.MULTILINE)
        names += here
        examples = "".join(blocks(page, "python"))
        assert {name for name in here if not re.search(rf"\b{name}\b", examples)} <= WITH_RAY, page.name
    assert sorted(names) == sorted([*sm.__all__, *sm.ops.__all__, "speculative_generate", *WITH_RAY])


def test_the_state_is_explicit_and_goes_back():
    """Any number of tokens per call, from a state that is the caller's."""
    names = run(ROOT / "docs" / "rollback.md")
    target, prompt = names["target"], names["prompt"]
    ids, start = torch.tensor([prompt[:8]]), torch.zeros(1, dtype=torch.int32)
    whole = target.verify(ids, target.new_cache(batch=1, slots=8), start)
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


def test_the_table_of_options_is_complete():
    """Every option of the program is in docs/command-line.md, which names no other."""
    table = text(ROOT / "docs" / "command-line.md").split("| option |")[1].split("\n\n")[0]
    named = set(re.findall(r"--([A-Za-z_]+)", table))
    assert named == options(PARSERS["generate"])


@pytest.mark.parametrize("command", ["serve", "batch"])
def test_the_table_of_a_command_s_own_options_is_complete(command):
    """Those of models and of sampling are in docs/command-line.md."""
    table = text(ROOT / "docs" / f"{command}.md").split("| option |")[1].split("\n\n")[0]
    shared = Parser()
    add_model_options(shared)
    add_sampling_options(shared)
    assert set(re.findall(r"--([A-Za-z_]+)", table)) == options(PARSERS[command]) - options(shared)


def test_the_commands_parse():
    commands = [
        command
        for document in DOCUMENTS
        for command in re.findall(
            r"^(?:speculative-mamba|python speculative_mamba/run\.py)((?: .*| *\\\n)*)$", text(document), re.MULTILINE
        )
    ]
    assert len(commands) >= 6
    for command in commands:
        words = re.sub(r"#.*", "", command).replace("\\", " ").split()
        parser = PARSERS[words.pop(0) if words and words[0] in PARSERS else "generate"]
        known = {name for action in parser._actions for name in action.option_strings}
        assert {word for word in words if word.startswith("--")} <= known, command


def anchors(document: Path) -> set[str]:
    """What headings can be linked as."""
    headings = re.findall(r"^#+ (.*)$", text(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for link in re.findall(r"\]\(([^)]+)\)", text(document)):
        if not link.startswith("https://"):
            name, _, anchor = link.partition("#")
            path = (document.parent / name).resolve() if name else document
            assert path.exists(), f"{document.name}: {link}"
            assert not anchor or anchor in anchors(path), f"{document.name}: {link}"


def test_the_readme_is_short_and_begins_with_two_commands():
    assert len(text(README).splitlines()) <= 160
    assert len(blocks(README, "bash")[0].splitlines()) == 2, ".ci/run takes them from there"
