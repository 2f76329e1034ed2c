"""Embeddings: the mean of the served model's last hidden states, of length 1, from each engine with them."""

import base64

import numpy as np
import pytest

from tests.services.serving import load_paged, load_tiny, paged_files, serving

ROUTE = "/v1/embeddings"
LIMITS = {"max_prompts": 4, "max_prompt_tokens": 200}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return paged_files(tmp_path_factory.mktemp("model") / "model")


@pytest.fixture(scope="module", params=[load_paged, load_tiny], ids=["paged", "transformers"])
def server(request, tmp_path_factory, files):
    folder = tmp_path_factory.mktemp("embeddings")
    with serving(folder, files, load=request.param, guard=LIMITS) as running:
        yield running


def embed(client, value, **fields):
    answer = client.post(ROUTE, json={"input": value, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def read_vectors(answer):
    return np.array([row["embedding"] for row in answer["data"]])


@pytest.fixture(scope="module")
def reference(server):
    """The mean of the last hidden states as transformers itself computes them."""
    import torch
    from transformers import AutoModelForCausalLM

    champion = server.handler.pool.champion
    model = AutoModelForCausalLM.from_pretrained(champion.files.base, dtype=torch.float32).eval()

    def compute(ids):
        with torch.inference_mode():
            states = model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        mean = states.double().mean(dim=0).numpy()
        return mean / np.linalg.norm(mean)

    return compute


def test_a_vector_is_the_mean_of_the_hidden_states(server, client, reference):
    texts = ["light on", "a", "turn the heating in the hall down " * 3]
    tokenizer = server.handler.pool.champion.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answer = embed(client, texts)
    vectors = read_vectors(answer)
    expected = np.array([reference(one) for one in ids])
    is_exact = server.handler.pool.champion.engine.name == "transformers"
    assert np.abs(vectors - expected).max() < (1e-5 if is_exact else 0.02)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert [row["index"] for row in answer["data"]] == [0, 1, 2]
    count = sum(map(len, ids))
    assert answer["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert np.array_equal(read_vectors(embed(client, texts[0])), read_vectors(embed(client, texts[0])))
    assert np.allclose(read_vectors(embed(client, ids)), vectors, atol=0.02)
    assert np.allclose(read_vectors(embed(client, ids[0])), vectors[:1], atol=0.02)


def test_base64_holds_the_same_numbers(client):
    plain = read_vectors(embed(client, "light on"))[0]
    (row,) = embed(client, "light on", encoding_format="base64")["data"]
    assert np.array_equal(np.frombuffer(base64.b64decode(row["embedding"]), "<f4"), plain.astype("<f4"))
    assert embed(client, "light on", dimensions=len(plain))["data"][0]["embedding"] == plain.tolist()


def test_no_answer_changes_by_a_vector_between(client):
    body = {"prompt": "light on", "max_tokens": 8}
    before = client.post("/v1/completions", json=body).json()["choices"]
    embed(client, ["light on", "light on and off"])
    assert client.post("/v1/completions", json=body).json()["choices"] == before


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "input"),
        ({"input": ""}, 422, "input"),
        ({"input": []}, 422, "input"),
        ({"input": [""]}, 422, "input"),
        ({"input": ["a", [1]], "dimensions": 0}, 422, "dimensions"),
        ({"input": [1.5]}, 422, "input"),
        ({"input": [-1]}, 422, "input"),
        ({"input": [[2**40]]}, 422, "input"),
        ({"input": ["a"] * 5}, 422, "input"),
        ({"input": "x" * 300}, 400, "input"),
        ({"input": "x" * 30_000}, 400, "input"),
        ({"input": [5] * 300}, 400, "input"),
        ({"input": "a", "dimensions": 7}, 422, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, 422, "encoding_format"),
        ({"input": "a", "model": "other"}, 404, "model"),
        ({"input": "a", "truncate": True}, 422, "truncate"),
    ],
    ids=lambda part: str(part)[:50],
)
def test_what_is_wrong_is_named(client, body, status, param):
    refused = client.post(ROUTE, json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (status, param), refused.text


@pytest.mark.slow
def test_openai_reads_the_vectors(server, client):
    import openai

    own = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    found = own.embeddings.create(model="tiny", input=["light on", "a"])  # the client asks for base64
    vectors = read_vectors(embed(client, ["light on", "a"]))
    assert np.allclose([row.embedding for row in found.data], vectors, atol=1e-6)
