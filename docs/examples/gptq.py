"""Round the tuned model's weights to 4 bits as vLLM serves them on a GPU: GPTQ by LLM Compressor.

In: what `dvc repro finetune` leaves: `artifacts/fetch_base`, `artifacts/finetune`, `artifacts/split`.
Out: FOLDER, a model with its tokenizer; what it loses on validation rows is printed.
Run: `make gptq ARGS=FOLDER`; LLM Compressor has an environment of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, atomic_dir
from stages.common.errors import InputError
from stages.common.logs import get_logger, run_stage, show_packages
from stages.common.model.adapter import read_settings
from stages.common.model.generation import Answer, answer_questions, encode_questions
from stages.common.model.loading import load_tokenizer, load_tuned, pick_device, pick_dtype
from stages.common.params.loading import load_params
from stages.common.records import read_rows
from stages.common.task.kinds import read_task
from stages.compress.variants import draw_calibration

logger = get_logger("gptq")

GROUPS = (128, 64, 32)  # weights with a scale of their own, as vLLM's kernels have them


def choose_group(widths: Sequence[int]) -> int:
    """Return the largest group that divides the rows of all matrices.

    Raises:
        InputError: none does.
    """
    for size in GROUPS:
        if not any(width % size for width in widths):
            return size
    odd = next(width for width in widths if width % GROUPS[-1])
    raise InputError(
        f"rows of {odd} weights are no multiple of {GROUPS[-1]}", "choose a base model with other widths"
    )


def round_weights(model: Any, tokens: Sequence[list[int]]) -> int:
    """Round all matrices but the output layer in place; return the weights that share a scale.

    Args:
        tokens: of the rows on which the outputs of each layer are to change least.
    """
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    head = model.get_output_embeddings()
    layers = [one for one in model.modules() if isinstance(one, torch.nn.Linear) and one is not head]
    group = choose_group([layer.in_features for layer in layers])
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        # It stays whole, and with it an embedding that is tied to it.
        ignore=["lm_head"],
    )
    rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in tokens]
    oneshot(
        model=model,
        dataset=Dataset.from_list(rows),
        recipe=recipe,
        max_seq_length=max(map(len, tokens)),
        num_calibration_samples=len(tokens),
    )
    return group


def main(arguments: Sequence[str] | None = None) -> None:
    """Round, write, read the written model back and compare the answers of both."""
    parser = argparse.ArgumentParser(prog="docs.examples.gptq", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="is made anew")
    parser.add_argument("--rows", type=int, default=256, help="training rows to calibrate with")
    parser.add_argument("--asked", type=int, default=200, help="validation rows to compare the answers of")
    options = parser.parse_args(arguments)
    show_packages(["datasets"])  # LLM Compressor's calibration rows
    from transformers import AutoModelForCausalLM

    params, base = load_params(), artifacts("fetch_base")
    adapter = artifacts("finetune")
    if (method := read_settings(adapter)["method"]) in ("head", "prompt_tuning", "prefix_tuning"):
        raise InputError(
            f"finetune.method {method} has no weights that could be merged", "use another method"
        )
    device = pick_device()
    tokenizer, dtype = load_tokenizer(base), pick_dtype(device, params.finetune.dtype)
    train = read_rows(artifacts("split") / "train.parquet")
    asked = read_rows(artifacts("split") / "validation.parquet")[: options.asked]
    questions = encode_questions(tokenizer, asked)

    def ask(model: Any, name: str) -> list[Answer]:
        logger.info("%s answers %d validation rows", name, len(asked))
        return answer_questions(model, tokenizer, questions, 16, params.ask_base.max_new_tokens)

    model = load_tuned(base, adapter, dtype, device)
    before = ask(model, "the tuned model")
    longest = params.finetune.max_length
    tokens = draw_calibration(train, tokenizer, options.rows, longest, params.compress.seed)
    group = round_weights(model, tokens)
    with atomic_dir(options.folder) as folder:
        model.save_pretrained(folder, save_compressed=True)
        tokenizer.save_pretrained(folder)
    del model
    written = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype).to(device).eval()
    after = ask(written, "the rounded one")
    task, references = read_task(), [row.answer for row in asked]
    score = [task.score_primary([one.text for one in answers], references) for answers in (before, after)]
    equal = sum(a.text == b.text for a, b in zip(before, after, strict=True))
    size = sum(path.stat().st_size for path in options.folder.glob("*.safetensors"))
    found = {
        "bytes": size,
        "calibration_rows": len(tokens),
        "equal_answers": equal,
        "group": group,
        "rows": len(asked),
        task.primary: [round(one.value(), 4) for one in score],
    }
    logger.info("%s", json.dumps(found))


if __name__ == "__main__":
    run_stage(main)
