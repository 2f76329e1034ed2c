"""Do the engines that evaluate and serve the tuned model answer as transformers' own `generate` does?

    python -m benchmarks.engine_agreement [--rows 200]

Run it in a checkout in which the pipeline has run; it writes nothing. Each test row is asked greedily: by
`generate` in float32, one row at a time, and by each contender. Where an answer differs, the margin shows how
close the choice was: the gap between the two most likely tokens for `generate`, at the first token that
differs, in nats.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from services.engines.offline import ModelFolders, answer_limit, ask_model
from stages.common.artifacts import artifacts
from stages.common.chat.template import end_of_turn_ids
from stages.common.model.generation import EvalPrompt, encode_questions
from stages.common.model.loading import load_tokenizer, load_tuned, pick_device
from stages.common.params.loading import load_params
from stages.common.records import read_rows


@dataclass(frozen=True, slots=True)
class Generated:
    """What `generate` wrote.

    Attributes:
        tokens: the ids, without the end of turn.
        margins: of each token: its log-probability minus that of the second most likely token.
    """

    text: str
    tokens: list[int]
    margins: list[float]


def generate(model: Any, tokenizer: Any, question: EvalPrompt, limit: int) -> Generated:
    """Ask transformers' `generate` one question."""
    import torch

    ends = end_of_turn_ids(tokenizer)
    prompt = torch.tensor([question.prompt], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=limit,
            do_sample=False,
            eos_token_id=list(ends),
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            output_logits=True,
        )
    tokens = out.sequences[0, len(question.prompt) :].tolist()
    best = [torch.topk(logits[0].float(), 2).values for logits in out.logits]
    margins = [float(first - second) for first, second in best]
    if tokens and tokens[-1] in ends:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Generated(text, tokens, margins)


def find_margin(reference: Generated, text: str, tokenizer: Any) -> float:
    """Return the margin of `generate`'s choice at the first token that differs from another answer."""
    other = tokenizer(text, add_special_tokens=False)["input_ids"]
    pairs = zip_longest(reference.tokens, other)
    place = next((i for i, (mine, theirs) in enumerate(pairs) if mine != theirs), len(reference.margins) - 1)
    return reference.margins[min(place, len(reference.margins) - 1)]


def main(arguments: Sequence[str] | None = None) -> None:
    """Ask the rows and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=200, help="test rows, spread over the test split")
    wanted = parser.parse_args(arguments).rows
    import torch

    base, adapter, gguf = artifacts("fetch_base"), artifacts("finetune"), artifacts("export") / "model.gguf"
    tokenizer = load_tokenizer(base)
    rows = read_rows(artifacts("split") / "test.parquet")
    rows = rows[:: max(1, len(rows) // wanted)][:wanted]
    questions = encode_questions(tokenizer, rows)
    settings = load_params().ask_base
    limit = answer_limit(questions, settings.max_new_tokens)
    model = load_tuned(base, adapter, torch.float32, pick_device())
    reference = [generate(model, tokenizer, question, limit) for question in questions]
    del model

    def ask(engine: Any, dtype: str) -> Callable[[], tuple[list[str], str]]:
        folders = ModelFolders(base, adapter, gguf if engine == "paged" else None)

        def run() -> tuple[list[str], str]:
            asked = ask_model(folders, engine, tokenizer, questions, settings.batch_size, limit, dtype)
            return [answer.text for answer in asked.answers], asked.dtype

        return run

    contenders = {
        "paged": ask("paged", "auto"),
        "paged, float32": ask("paged", "float32"),
        f"transformers, batches of {settings.batch_size}": ask("transformers", "auto"),
        f"transformers, batches of {settings.batch_size}, float32": ask("transformers", "float32"),
    }
    print("| engine | computes in | same answer | exact match | `generate`'s | margins of the others |")
    print("|---|---|---:|---:|---:|---|")
    right = sum(one.text == row.answer for one, row in zip(reference, rows, strict=True)) / len(rows)
    for name, run in contenders.items():
        texts, dtype = run()
        others = [
            find_margin(one, text, tokenizer)
            for one, text in zip(reference, texts, strict=True)
            if one.text != text
        ]
        exact = sum(text == row.answer for text, row in zip(texts, rows, strict=True)) / len(rows)
        margins = f"{statistics.median(others):.2f}, at most {max(others):.2f}" if others else "–"
        same = f"{len(rows) - len(others)} of {len(rows)}"
        print(f"| {name} | {dtype} | {same} | {exact:.3f} | {right:.3f} | {margins} |")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
