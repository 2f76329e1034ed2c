"""Compare an adapter downloaded from the registry with the trained one; `flows.registry.runs` runs it.

Loads the base model with each of them, and compares the logits of some prompts bit by bit.

    python -m flows.registry.verify_adapter --base DIR --trained DIR --reloaded DIR --rows FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stages.common.chat.template import encode_prompt
from stages.common.errors import InputError
from stages.common.logs import run_stage
from stages.common.machine.parent import end_with_parent
from stages.common.model.loading import add_adapter, load_base, load_tokenizer, pick_device, pick_dtype
from stages.common.records import read_rows


def compare(base: Path, trained: Path, reloaded: Path, prompts: Sequence[Sequence[int]]) -> float:
    """Return the largest change of a logit of the base model by the adapters.

    Args:
        prompts: token ids.

    Raises:
        InputError: the two adapters differ in a logit, or change none.
    """
    import torch

    device = pick_device()
    dtype = pick_dtype(device)
    model = load_base(base, dtype, device)

    def logits(model: Any) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [model(torch.tensor([ids], device=device)).logits.float().cpu() for ids in prompts]

    plain = logits(model)
    wanted = logits(add_adapter(model, trained))
    del model  # one model in memory
    found = logits(add_adapter(load_base(base, dtype, device), reloaded))
    differing = sum(not torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    if differing:
        gap = max(float((a - b).abs().max()) for a, b in zip(wanted, found, strict=True))
        raise InputError(
            f"the logits of {differing} of {len(prompts)} prompts differ, by up to {gap:.3g}",
            "the registry's copy is not the trained adapter",
        )
    # A head over labels has logits of its own, all zero where its weights were not found.
    change = max(
        float((a - b if a.shape == b.shape else a).abs().max()) for a, b in zip(wanted, plain, strict=True)
    )
    if change == 0.0:
        raise InputError(
            "the adapter changes no logit of the base model",
            "train again, and look at reports/finetune/loss.csv: it has learned nothing, or was not loaded",
        )
    return change


def main() -> None:
    """Compare two adapters, and print how much they change."""
    end_with_parent()
    parser = argparse.ArgumentParser(prog="python -m flows.registry.verify_adapter")
    for name in ("base", "trained", "reloaded", "rows"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=4)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.base)
    rows = read_rows(options.rows)
    some = rows[:: max(1, len(rows) // options.prompts)][: options.prompts]
    prompts = [encode_prompt(tokenizer, row.prompt, row.tools) for row in some]
    change = compare(options.base, options.trained, options.reloaded, prompts)
    sys.stdout.write(f"equal logits for {len(prompts)} prompts, up to {change:.3g} from the base model's\n")


if __name__ == "__main__":
    run_stage(main)
