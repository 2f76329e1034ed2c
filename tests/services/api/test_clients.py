"""Real clients of OpenAI's API against the real service: openai's own here, six others in `tests/clients`."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.clients.test_clients import QUESTION, SCHEMA

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
PAIRS = (
    ("turn on", " lights"),
    ("a", "b"),
    ("Question: 1 + 1\nAnswer:", " 2"),
    ("a", "é🙂"),
    ("x", "yz"),
)


@pytest.fixture(scope="module")
def changes():
    return {"answers": {"default_max_tokens": 8, "max_tokens": 64}, "guard": {"max_prompt_tokens": 300}}


@pytest.fixture(scope="module")
def url(server):
    return f"{server.url}/v1"


@pytest.fixture(scope="module")
def plain(server):
    """The answer to the question, as it is without a client: its text and its usage."""
    with server.client() as client:
        body = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 8}
        answer = client.post("/v1/chat/completions", json=body).json()
    return answer["choices"][0]["message"]["content"], answer["usage"]


def test_openai(url, plain):
    import openai
    from pydantic import BaseModel

    class Call(BaseModel):
        intent: str
        now: bool

    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
    messages = [{"role": "user", "content": QUESTION}]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, max_tokens=8, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    usages = [chunk.usage for chunk in chunks if chunk.usage is not None]
    assert text == plain[0]
    assert [usage.total_tokens for usage in usages] == [plain[1]["total_tokens"]]
    several = client.completions.create(model="tiny", prompt=["a", "b"], max_tokens=4, echo=True, logprobs=1)
    assert [choice.text[0] for choice in several.choices] == ["a", "b"]
    wanted = {"type": "json_schema", "json_schema": {"name": "call", "schema": SCHEMA, "strict": True}}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, max_completion_tokens=4096, response_format=wanted
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"intent", "now"}
    with pytest.raises(
        openai.UnprocessableEntityError, match="chat template does not write the tools"
    ) as refused:
        client.chat.completions.create(
            model="tiny", messages=messages, tools=[{"type": "function", "function": {"name": "f"}}]
        )
    assert refused.value.param == "tools" and refused.value.request_id.startswith("req_")
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 400}])
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.APIStatusError) as large:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 9_000_000}])
    assert large.value.status_code == 413


def score(server, context, continuation):
    """Return the log-probability of a continuation, and whether the model itself would write it."""
    import torch

    pool = server.handler.pool.champion
    ids = pool.tokenizer(context, add_special_tokens=False)["input_ids"]
    whole = pool.tokenizer(context + continuation, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        logits = pool.engine._model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    places = range(len(ids) - 1, len(whole) - 1)
    nats = sum(logits[place, whole[place + 1]].item() for place in places)
    return nats, all(int(logits[place].argmax()) == whole[place + 1] for place in places)


@pytest.fixture(scope="module")
def expected(server, url, plain, tmp_path_factory):
    """The file that tells the clients' tests what is right."""
    folder = tmp_path_factory.mktemp("clients")
    server.handler.pool.champion.tokenizer.save_pretrained(folder / "tokenizer")
    with server.client() as client:
        body = {"prompt": ["a", "bc"], "max_tokens": 4, "stop": ["\n\n"]}
        choices = client.post("/v1/completions", json=body).json()["choices"]
    values = {
        "url": url,
        "text": plain[0],
        "usage": plain[1],
        "tokenizer": str(folder / "tokenizer"),
        "pairs": PAIRS,
        "scores": [score(server, *pair) for pair in PAIRS],
        "completions": [choice["text"] for choice in choices],
    }
    path = folder / "expected.json"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


@pytest.mark.skipif(not PYTHON.exists(), reason="clients have an own environment: make test-slow")
@pytest.mark.parametrize("name", ["langchain", "litellm", "instructor", "pydantic_ai", "llm", "lm_eval"])
def test_client(expected, tmp_path, name):
    """The test of one client, in the environment of the clients."""
    folder = ROOT / "tests" / "clients"
    # Nothing of the project's own settings and fixtures.
    options = ["-c", os.devnull, "--rootdir", str(folder), "--confcutdir", str(folder)]
    done = subprocess.run(
        [str(PYTHON), "-m", "pytest", *options, str(folder / "test_clients.py"), "-k", f"test_{name}"],
        env={
            "PATH": os.environ["PATH"],
            "HOME": str(tmp_path),  # llm and litellm write there
            "PERENNIAL_CLIENTS_EXPECTED": str(expected),
            "PYTEST_ADDOPTS": "-q -p no:cacheprovider",
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
