"""Training speed: `stages.finetune` against `trl.SFTTrainer` with its defaults, on the same rows.

    python -m benchmarks.training [--rows 120] [--repeats 3] [--out training.json]

Needs `artifacts/fetch_base` and `artifacts/split` (`dvc repro split`). They run in turns, each in a
separate process. Tokens are those of the rows, without padding; the time is that of the whole call of
`train()`, including its first, slow step. Prints a JSON object; `docs/benchmarks.md` keeps the results.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from stages.common.artifacts import artifacts
from stages.common.chat.template import encode_example
from stages.common.model.loading import load_tokenizer, pick_device
from stages.common.params.loading import load_params
from stages.common.records import Row, read_rows
from stages.finetune.adapter import build_model
from stages.finetune.objectives.answers import Answers
from stages.finetune.recipe import Recipe
from stages.finetune.trainer import measure_peak_rss_mib, train

# Passes of ours over the rows: it is so much faster that one pass would be over in seconds.
OUR_EPOCHS = 4


def run_ours(rows: list[Row], recipe: Recipe) -> dict[str, float]:
    """Train with the stage's own code and the parameters of `params.yaml`."""
    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    examples = [encode_example(tokenizer, row.messages) for row in rows]
    model = build_model(base, replace(recipe, epochs=OUR_EPOCHS))
    with tempfile.TemporaryDirectory() as folder:
        trained = train(
            model,
            Answers(examples),
            [],
            tokenizer.pad_token_id,
            replace(recipe, epochs=OUR_EPOCHS),
            Path(folder),
            checkpoint_every_steps=1_000_000,
        )
    return figures(trained.tokens, trained.seconds)


def run_trl(rows: list[Row], recipe: Recipe) -> dict[str, float]:
    """Train the same LoRA with `SFTTrainer` and its defaults; one pass over the rows."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    base = artifacts("fetch_base")
    tokenizer = load_tokenizer(base)
    tokens = sum(len(encode_example(tokenizer, row.messages).input_ids) for row in rows)
    conversations = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in row.prompt],
            "completion": [{"role": "assistant", "content": row.answer}],
        }
        for row in rows
    ]
    targets = recipe.target_modules
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=str(base),
            args=SFTConfig(
                output_dir=folder,
                num_train_epochs=1,
                report_to="none",
                save_strategy="no",
                # Without a GPU it refuses its default of bfloat16 unless it is told so.
                use_cpu=pick_device().type == "cpu",
            ),
            train_dataset=Dataset.from_list(conversations),
            peft_config=LoraConfig(
                r=recipe.rank,
                lora_alpha=recipe.alpha,
                target_modules=targets if isinstance(targets, str) else list(targets),
                task_type="CAUSAL_LM",
            ),
        )
        started = time.monotonic()
        trainer.train()
        return figures(tokens, time.monotonic() - started)


def figures(tokens: int, seconds: float) -> dict[str, float]:
    """Return the measurements of one run."""
    return {
        "tokens": tokens,
        "seconds": round(seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_rss_mib": measure_peak_rss_mib(),
    }


CONTESTANTS = {"trl": run_trl, "ours": run_ours}


def in_own_process(name: str, rows: int) -> dict[str, float]:
    """Run one trainer and return its measurements."""
    command = [sys.executable, "-m", "benchmarks.training", "--rows", str(rows), "--only", name]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, float] = json.loads(output.splitlines()[-1])
    print(f"{name}: {result}", file=sys.stderr)
    return result


def main() -> None:
    """Run both in turns, and print the median of each and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=120)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="also write the JSON object to this file")
    parser.add_argument(
        "--only", choices=sorted(CONTESTANTS), help="one run of one contestant, in this process"
    )
    arguments = parser.parse_args()

    if arguments.only:
        params = load_params().finetune
        recipe = Recipe(**params.model_dump(include=set(Recipe.__dataclass_fields__)))
        every_row = read_rows(artifacts("split") / "train.parquet")
        rows = random.Random(recipe.seed).sample(every_row, arguments.rows)
        print(json.dumps(CONTESTANTS[arguments.only](rows, recipe)))
        return

    runs: dict[str, list[dict[str, float]]] = {name: [] for name in CONTESTANTS}
    for _ in range(arguments.repeats):
        for name, results in runs.items():
            results.append(in_own_process(name, arguments.rows))
    speed = {n: statistics.median(r["tokens_per_second"] for r in results) for n, results in runs.items()}
    report: dict[str, Any] = {
        "machine": machine(),
        "rows": arguments.rows,
        "tokens_per_second": speed,
        "ratio": round(speed["ours"] / speed["trl"], 2),
        "runs": runs,
    }
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
