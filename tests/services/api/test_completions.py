"""/v1/completions: lists of prompts, echo and log-probabilities of prompts; and tokens at stop strings."""

import math

import pytest

from tests.services.serving import ask, serving, stream, tiny_files

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def changes():
    return {"guard": {"max_prompts": 20}}


def complete(client, prompt, **fields):
    answer = client.post(PATH, json={"prompt": prompt, "max_tokens": 4, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def ids_of(server, text):
    return server.handler.pool.champion.tokenizer(text, add_special_tokens=False)["input_ids"]


PROMPTS = ["turn on", "é🙂", "x" * 40, "off", "a"]


def test_each_prompt_of_a_list_gets_the_choice_it_gets_alone(client, server):
    alone = [complete(client, prompt) for prompt in PROMPTS]
    together = complete(client, PROMPTS)
    assert [choice["index"] for choice in together["choices"]] == list(range(len(PROMPTS)))
    for choice, single in zip(together["choices"], alone, strict=True):
        assert choice["text"] == single["choices"][0]["text"]
        assert choice["finish_reason"] == single["choices"][0]["finish_reason"]
    for number in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert together["usage"][number] == sum(single["usage"][number] for single in alone)
    as_ids = complete(client, [ids_of(server, prompt) for prompt in PROMPTS])
    assert [choice["text"] for choice in as_ids["choices"]] == [
        choice["text"] for choice in together["choices"]
    ]


@pytest.mark.parametrize("prompt", [["turn on"], [[5, 6, 7]], [5, 6, 7], "turn on"])
def test_one_prompt_is_one_choice_however_it_is_sent(client, prompt):
    assert len(complete(client, prompt)["choices"]) == 1


def test_a_list_is_streamed_with_the_place_of_each_prompt(client):
    whole = complete(client, PROMPTS)
    chunks = stream(client, PATH, prompt=PROMPTS, max_tokens=4, stream_options={"include_usage": True})
    texts, reasons = [""] * len(PROMPTS), [None] * len(PROMPTS)
    for chunk in chunks[:-1]:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        reasons[choice["index"]] = reasons[choice["index"]] or choice["finish_reason"]
    assert texts == [choice["text"] for choice in whole["choices"]]
    assert reasons == [choice["finish_reason"] for choice in whole["choices"]]
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"] == whole["usage"]


@pytest.mark.parametrize(
    "prompt",
    ["", [], [""], [[]], ["a", ""], ["a", 5], [5, "a"], 5, None, [None], [True], [[5.0]]],
)
def test_a_prompt_that_is_none_is_refused_under_its_name(client, prompt):
    answer = client.post(PATH, json={"prompt": prompt})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (422, "prompt"), answer.text
    assert "list of token ids" in error["message"]


def test_too_many_prompts_and_ids_that_are_no_tokens_are_refused(client):
    for prompt, words in ((["a"] * 21, "at most 20"), ([[5], [5, 999_999]], "999999"), ([-1], "-1")):
        error = client.post(PATH, json={"prompt": prompt}).json()["error"]
        assert error["param"] == "prompt" and words in error["message"]


def test_one_bad_prompt_of_a_list_is_the_answer_to_the_list(client):
    answer = client.post(PATH, json={"prompt": ["a", "a" * 9_000, "b"], "max_tokens": 4})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert complete(client, ["a", "b"])["choices"]


def test_every_prompt_of_a_list_counts_against_the_rate(tmp_path):
    served = serving(tmp_path, tiny_files(tmp_path / "model"), access={"requests_per_minute": 4})
    with served as server, server.client() as client:
        body = {"prompt": ["a", "b", "c"], "max_tokens": 1}
        assert [client.post(PATH, json=body).status_code for _ in range(2)] == [200, 429]


def test_echo_repeats_the_prompt_in_front_of_the_answer(client, server):
    for prompt in ("turn on é🙂", ids_of(server, "turn on é🙂")):
        plain = complete(client, prompt)
        echoed = complete(client, prompt, echo=True)
        assert echoed["choices"][0]["text"] == "turn on é🙂" + plain["choices"][0]["text"]
        assert echoed["choices"][0]["logprobs"] is None
        assert echoed["usage"] == plain["usage"]
        chunks = stream(client, PATH, prompt=prompt, max_tokens=4, echo=True)
        text = "".join(choice["text"] for chunk in chunks for choice in chunk["choices"])
        assert text == echoed["choices"][0]["text"]


def score(server, ids):
    """Return the log-probabilities of a prompt by the model itself, without the service."""
    import torch

    model = server.handler.pool.champion.engine._model
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return [logits[place, token].item() for place, token in enumerate(ids[1:])]


@pytest.mark.parametrize("text", ["ab", "turn on the lights é🙂", "x" * 400])
def test_log_probabilities_of_a_prompt_are_the_models_own(client, server, text):
    ids = ids_of(server, text)
    for prompt in (text, ids):
        found = complete(client, prompt, max_tokens=0, echo=True, logprobs=1)
        logprobs = found["choices"][0]["logprobs"]
        assert found["choices"][0]["text"] == text
        assert found["usage"] == {
            "prompt_tokens": len(ids),
            "completion_tokens": 0,
            "total_tokens": len(ids),
        }
        assert logprobs["token_logprobs"][1:] == pytest.approx(score(server, ids), abs=1e-3)
        assert {
            len(logprobs[key]) for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")
        } == {len(ids)}
        for nats, table in zip(logprobs["token_logprobs"][1:], logprobs["top_logprobs"][1:], strict=True):
            assert nats in table.values() and max(table.values()) >= nats
        assert logprobs["text_offset"][0] == 0
        assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def test_behind_an_echo_there_is_one_token_at_least_though_the_answer_is_empty(client, server):
    """The end of turn is one: a client that scores a text skips the last entry."""
    for text in ("a", "b", "turn", "on", "xy", "42"):
        ids = ids_of(server, text)
        found = complete(client, ids, max_tokens=1, echo=True, logprobs=1)["choices"][0]
        assert len(found["logprobs"]["tokens"]) == len(ids) + 1


def test_no_tokens_without_an_echo_are_refused(client):
    error = client.post(PATH, json={"prompt": "a", "max_tokens": 0}).json()["error"]
    assert error["param"] == "max_tokens" and "echo" in error["message"]


def entries_of(choice):
    return choice["logprobs"]["content"] if choice["logprobs"] else []


WORDS = {
    "type": "json_schema",
    "json_schema": {"schema": {"type": "array", "items": {"enum": ["on", "off"]}, "minItems": 5}},
}


@pytest.mark.parametrize("length", [1, 2, 3])
def test_nothing_of_a_stop_string_is_in_logprobs_or_usage(client, length):
    wanted = {"max_tokens": 24, "logprobs": True, "response_format": WORDS}
    text = ask(client, **wanted).json()["choices"][0]["message"]["content"]
    at = next(n for n in range(2, 20) if text.find(text[n : n + length]) == n)
    stop = text[at : at + length]
    answer = ask(client, **wanted, stop=stop).json()
    choice = answer["choices"][0]
    entries = entries_of(choice)
    shown = b"".join(bytes(entry["bytes"]) for entry in entries)
    assert choice["message"]["content"] == text[:at]
    assert shown == text[:at].encode()
    assert len(entries) == answer["usage"]["completion_tokens"]
    body = {"messages": [{"role": "user", "content": "Hello"}], "stop": stop, **wanted}
    chunks = stream(client, "/v1/chat/completions", **body)
    streamed = [entry for chunk in chunks for choice in chunk["choices"] for entry in entries_of(choice)]
    assert streamed == entries


def test_the_bytes_of_the_tokens_of_an_answer_are_its_text(client):
    answer = ask(client, max_tokens=40, logprobs=True, top_logprobs=20, temperature=1.5, seed=4).json()
    choice = answer["choices"][0]
    shown = b"".join(bytes(entry["bytes"]) for entry in entries_of(choice))
    assert shown.decode(errors="replace") == choice["message"]["content"]
    for entry in entries_of(choice):
        alternatives = entry["top_logprobs"]
        assert len({tuple(one["bytes"]) for one in alternatives}) == len(alternatives)
        assert len({one["token"] for one in alternatives}) == len(alternatives)
        assert math.isfinite(entry["logprob"])
