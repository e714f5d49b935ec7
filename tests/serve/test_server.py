"""OpenAI's API on a running server: every text is that of ``generate`` for its request alone."""

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby

import pytest
from servers import PROMPT, ask, complete, events, expected, target

import speculative_mamba as sm

pytest.importorskip("fastapi", reason="the extra [serve] is not installed")
openai = pytest.importorskip("openai", reason="the extra [test] is not installed")

SAMPLED = {"temperature": 1.1, "top_p": 0.9, "seed": 5}


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def model(client):
    return client.models.list().data[0].id


def test_models(client, model):
    described = client.models.retrieve(model)
    assert (described.id, described.object) == ("builtin:target", "model")
    assert (described.draft, described.chat, described.max_model_len) == ("builtin:draft", False, 8192)
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("gpt-9")
    assert (error.value.param, error.value.code) == ("model", "model_not_found")


def test_a_completion(client, model):
    made = client.completions.create(model=model, prompt=PROMPT, max_tokens=40, temperature=0)
    assert (made.object, made.model, len(made.choices)) == ("text_completion", model, 1)
    assert (made.choices[0].text, made.choices[0].finish_reason) == (expected(tokens=40), "length")
    ids, draft = target().tokenizer.encode(PROMPT).ids, sm.load_model("builtin:draft")
    stats = sm.generate(target(), [ids], draft=draft, max_new_tokens=40).stats
    details = made.usage.completion_tokens_details
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.total_tokens) == (11, 40, 51)
    tested = details.accepted_prediction_tokens + details.rejected_prediction_tokens
    assert (details.accepted_prediction_tokens, tested) == (stats.accepted, stats.tested)


@pytest.mark.parametrize(
    "fields",
    [
        {}, SAMPLED, {**SAMPLED, "top_k": 5}, {**SAMPLED, "top_k": -1}, {"temperature": 1, "min_p": 0.2, "seed": 0},
        {"repetition_penalty": 1.4}, {"presence_penalty": 1.5}, {"frequency_penalty": -1.5}, {**SAMPLED, "top_p": 1},
        {"logit_bias": {"101": -100, "32": 1.5}}, {"max_tokens": 1}, {"max_tokens": 33}, {"use_draft": False},
        {"ignore_eos": True}, {"user": "someone", "best_of": 1, "suffix": "", "n": 1, "stop": None, "echo": False},
    ],
    ids=str,
)  # fmt: skip
def test_fields_mean_what_they_mean_to_generate(url, fields):
    reply = complete(url, **fields).json
    sampling = {"temperature": 0} | {name: fields[name] for name in fields if name in sm.SamplingParams.__match_args__}
    sampling["logit_bias"] = {int(token): bias for token, bias in fields.get("logit_bias", {}).items()}
    if sampling.get("top_k") == -1:
        del sampling["top_k"]
    assert reply["choices"][0]["text"] == expected(tokens=fields.get("max_tokens", 12), **sampling)
    assert reply["usage"]["completion_tokens"] == fields.get("max_tokens", 12)
    if fields.get("use_draft") is False:
        assert reply["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] == 0


def test_absent_fields(url):
    """OpenAI's: 16 tokens at temperature 1, with another seed each time."""
    replies = [ask(f"{url}/v1/completions", {"prompt": PROMPT}).json for _ in range(2)]
    assert [reply["usage"]["completion_tokens"] for reply in replies] == [16, 16]
    assert replies[0]["choices"][0]["text"] != replies[1]["choices"][0]["text"]


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ([PROMPT, "He said"], [PROMPT, "He said"]), ([72, 101, 32], [[72, 101, 32]]),
        ([[72, 101], [32]], [[72, 101], [32]]), ("naïve café 🙂", ["naïve café 🙂"]),
    ],
    ids=["texts", "ids", "lists of ids", "not ASCII"],
)  # fmt: skip
def test_prompts(client, model, prompt, texts):
    made = client.completions.create(model=model, prompt=prompt, max_tokens=12, temperature=0)
    assert [choice.text for choice in made.choices] == [expected(text) for text in texts]
    assert [choice.index for choice in made.choices] == list(range(len(texts)))


def test_n_texts_have_n_seeds(client, model):
    """Choice i of a prompt is what a request with seed + i gives; a prompt counts once."""
    made = client.completions.create(model=model, prompt=[PROMPT, "He said"], max_tokens=12, n=3, **SAMPLED)
    seeds = [{**SAMPLED, "seed": SAMPLED["seed"] + index} for index in range(3)]
    texts = [expected(prompt, **sampling) for prompt in (PROMPT, "He said") for sampling in seeds]
    assert [choice.text for choice in made.choices] == texts and len(set(texts)) == 6
    assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (18, 72)


@pytest.mark.parametrize("stop", [" ", ["zzz", "much", "so"], ["been so"]], ids=str)
def test_stop(client, model, stop):
    made = client.completions.create(model=model, prompt=PROMPT, max_tokens=40, temperature=0, stop=stop)
    text = expected(tokens=40, stop=(stop,) if isinstance(stop, str) else tuple(stop))
    assert (made.choices[0].text, made.choices[0].finish_reason) == (text, "stop")
    assert len(text) < len(expected(tokens=40)) and not any(one in text for one in stop)


def test_stop_tokens(url):
    whole = expected()
    [choice] = complete(url, stop_token_ids=[ord(whole[5])]).json["choices"]
    assert choice["finish_reason"] == "stop" and whole.startswith(choice["text"]) and len(choice["text"]) < 12


@pytest.mark.parametrize("fields", [{}, {"n": 2, **SAMPLED}, {"stop": "much"}, {"echo": True}], ids=str)
def test_a_stream_is_the_text_in_pieces(client, model, fields):
    fields = {"model": model, "prompt": PROMPT, "max_tokens": 40, "temperature": 0, **fields}
    whole = client.completions.create(**fields)
    chunks = list(client.completions.create(**fields, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert last.choices == [] and last.usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks) and len({chunk.id for chunk in chunks}) == 1
    for choice in whole.choices:
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(piece.text for piece in own) == choice.text
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [choice.finish_reason]
    tokens = [chunk.choices[0] for chunk in chunks if "drafted" in chunk.choices[0].model_extra]
    assert len(tokens) == whole.usage.completion_tokens
    drafted = sum(piece.drafted for piece in tokens)
    assert drafted == whole.usage.completion_tokens_details.accepted_prediction_tokens > 0


def test_counts_so_far_in_every_chunk(url):
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _, last = events(complete(url, stream=True, stream_options=options, max_tokens=40))
    counts = [chunk["usage"] for chunk in chunks]
    assert [count["completion_tokens"] for count in counts] == list(range(1, 41))
    accepted = [count["completion_tokens_details"]["accepted_prediction_tokens"] for count in counts]
    drafted = [chunk["choices"][0]["drafted"] for chunk in chunks]
    assert accepted == sorted(accepted) and all(sum(drafted[: i + 1]) <= accepted[i] for i in range(40))
    assert counts[-1]["completion_tokens_details"] == last["usage"]["completion_tokens_details"]


def test_a_round_drafts_at_most_four_tokens(url):
    chunks = events(complete(url, stream=True, max_tokens=60))
    flags = [chunk["choices"][0]["drafted"] for chunk in chunks if "drafted" in chunk["choices"][0]]
    runs = [len(list(group)) for drafted, group in groupby(flags) if drafted]
    assert runs and max(runs) <= 4


def logprobs_of(ids, tokens, n):
    """From the target's logits: of each new token, and the n likeliest."""
    result = sm.generate(target(), [ids], max_new_tokens=tokens, output_logits=True)
    logprobs = result.logits[0].log_softmax(-1)
    new = result.sequences[0][len(ids) :]
    top = logprobs.topk(n, dim=-1) if n else None
    return new.tolist(), logprobs.gather(1, new[:, None])[:, 0].tolist(), top


@pytest.mark.parametrize("n", [0, 3])
def test_logprobs(client, model, n):
    made = client.completions.create(model=model, prompt=PROMPT, max_tokens=12, temperature=0, logprobs=n)
    tokens, logprobs, top = logprobs_of(target().tokenizer.encode(PROMPT).ids, 12, n)
    got = made.choices[0].logprobs
    assert got.tokens == [chr(token) for token in tokens] and "".join(got.tokens) == made.choices[0].text
    assert got.text_offset == list(range(12))
    assert got.token_logprobs == pytest.approx(logprobs, abs=1e-5)
    for index, likeliest in enumerate(got.top_logprobs):
        assert got.tokens[index] in likeliest and len(likeliest) in ((n, n + 1) if n else (1,))
        if n:
            assert sorted(likeliest.values(), reverse=True)[:n] == pytest.approx(top.values[index].tolist(), abs=1e-5)


def test_logprobs_of_a_stream(url):
    whole = complete(url, logprobs=2).json["choices"][0]["logprobs"]
    pieces = [chunk["choices"][0]["logprobs"] for chunk in events(complete(url, logprobs=2, stream=True))]
    for name, values in whole.items():
        assert [value for piece in pieces if piece for value in piece[name]] == values


def test_echo(url):
    assert complete(url, echo=True).json["choices"][0]["text"] == PROMPT + expected()
    assert complete(url, echo=True, prompt=[72, 101]).json["choices"][0]["text"] == "He" + expected([72, 101])


def test_tokens_that_are_parts_of_characters_differ(url):
    logprobs = complete(url, logit_bias={"195": 100}, max_tokens=1, logprobs=0).json["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xc3"] and list(logprobs["top_logprobs"][0]) == logprobs["tokens"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(url):
    def curl(*arguments):
        result = subprocess.run(["curl", "-sS", *arguments], capture_output=True, text=True, timeout=60)
        assert result.returncode == 0, result.stderr
        return result.stdout

    json_type = ("-H", "Content-Type: application/json")
    body = json.dumps({"prompt": PROMPT, "max_tokens": 12, "temperature": 0})
    made = json.loads(curl(f"{url}/v1/completions", *json_type, "-d", body))
    assert made["choices"][0]["text"] == expected()
    lines = curl("-N", f"{url}/v1/completions", *json_type, "-d", body[:-1] + ', "stream": true}').split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == expected()
    refused = json.loads(curl(f"{url}/v1/completions", *json_type, "-d", '{"prompt": "a", "tools": [1]}'))
    assert refused["error"]["param"] == "tools"
    assert json.loads(curl(f"{url}/health")) == {"status": "ok"}
    assert "Content-Type: application/json" in curl(f"{url}/v1/completions", "-d", body), "a form is no JSON"


def test_many_at_once_get_what_each_gets_alone(url):
    """More than there are rows, of every kind."""
    kinds = [{"seed": seed, "temperature": 1.2, "max_tokens": 4 + seed % 9} for seed in range(20)]
    kinds += [{"max_tokens": 20, "use_draft": False}, {"repetition_penalty": 1.3}, {"stop": "e"}, {"logprobs": 2}]
    with ThreadPoolExecutor(len(kinds)) as pool:
        replies = list(pool.map(lambda fields: complete(url, **fields).json["choices"][0]["text"], kinds))
    for fields, text in zip(kinds, replies, strict=True):
        sampling = {name: fields[name] for name in fields if name in sm.SamplingParams.__match_args__}
        stop = (fields["stop"],) if "stop" in fields else ()
        assert text == expected(tokens=fields.get("max_tokens", 12), stop=stop, **sampling), fields


def test_metrics(url):
    from prometheus_client.parser import text_string_to_metric_families

    def read():
        reply = ask(f"{url}/metrics")
        assert reply.status == 200 and reply.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(reply.body.decode())
        samples = [sample for family in families for sample in family.samples]
        return {
            (sample.name.removeprefix("speculative_mamba_"), *sample.labels.values()): sample.value
            for sample in samples
        }

    before = read()
    complete(url, max_tokens=20)
    complete(url, tools=[])
    after = read()

    def gained(*name):
        return after[name] - before.get(name, 0)

    assert (after["requests_running",], after["requests_waiting",]) == (0, 0)
    assert (gained("prompt_tokens_total"), gained("generated_tokens_total")) == (11, 20)
    assert 0 < gained("accepted_tokens_total") <= gained("draft_tokens_total")
    assert 0 < after["acceptance_rate",] < 1 and gained("requests_total", "length") == 1
    assert gained("http_responses_total", "200") == gained("http_responses_total", "400") == 1
    assert gained("time_to_first_token_seconds_count") == gained("call_duration_seconds_count") == 1
