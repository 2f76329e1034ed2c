"""llama.cpp itself, in this process: the reader for which GGUF files are written."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path


class LlamaCpp:
    """A GGUF file, loaded; one thread, one request at a time."""

    def __init__(self, gguf: Path, context_tokens: int = 512):
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(gguf)
        params.n_ctx = context_tokens
        params.n_parallel = 1
        params.verbosity = 0
        params.warmup = False
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        self.server = xllamacpp.Server(params)

    def tokens(self, text: str) -> list[int]:
        """Return the token ids of a text in which special tokens may stand."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        url = self.server.listening_address + "/tokenize"
        with urllib.request.urlopen(url, body, timeout=30) as answer:
            return json.load(answer)["tokens"]

    def complete(self, prompt: list[int], max_tokens: int, logprobs: int = 1) -> list[dict[int, float]]:
        """Return, for each greedy token, the likeliest tokens with their logprobs, the one taken first."""
        wish = {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "logprobs": logprobs}
        [choice] = self.server.handle_completions(wish)["choices"]
        return [
            {
                one["id"]: one["logprob"],
                **{other["id"]: other["logprob"] for other in one["top_logprobs"]},
            }
            for one in choice["logprobs"]["content"]
        ]

    def chat(self, messages: list[dict[str, str]], max_tokens: int) -> str:
        """Return the greedy answer, with the chat template inside the file."""
        wish = {"messages": messages, "max_tokens": max_tokens, "temperature": 0}
        return self.server.handle_chat_completions(wish)["choices"][0]["message"]["content"]
