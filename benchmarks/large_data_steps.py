"""What `benchmarks.large_data` needs between the stages: a small base model, an adapter, answers of the base.

    python -m benchmarks.large_data_steps {base,adapter,answers,model_card}

Each is run in the folder of the rows. The base has the tokenizer of the checkout's base and random weights of
one narrow layer. `model_card` goes through the rows as that stage does.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from stages.common.artifacts import artifacts, reports, write_json
from stages.common.model.generation import Answer, write_answers
from stages.common.params.loading import load_params
from stages.common.records import read_rows
from stages.common.spool import join
from stages.model_card.checks import check_rows
from stages.model_card.evidence import read_sides
from stages.model_card.sections import count_sources, list_languages

ROOT = Path(__file__).parents[1]
CONTEXT_TOKENS = 131_072  # so that no row is left out
ANSWER_TOKENS = 8


def write_base() -> None:
    """Write a Llama of one layer with the tokenizer of the checkout's base model."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / artifacts("fetch_base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=CONTEXT_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(artifacts("fetch_base"))
    tokenizer.save_pretrained(artifacts("fetch_base"))
    shutil.copy(ROOT / artifacts("fetch_base") / "tokenizer_config.json", artifacts("fetch_base"))
    about = {"license": "apache-2.0", "name": "random", "revision": None, "sha256": "0" * 64}
    write_json(reports("fetch_base") / "metrics.json", about)


def write_adapter() -> None:
    """Write an adapter that has learned nothing."""
    from stages.finetune.adapter import build_model, save_adapter
    from stages.finetune.recipe import Recipe

    recipe = Recipe(**load_params().finetune.model_dump(include=set(Recipe.__dataclass_fields__)))
    save_adapter(build_model(artifacts("fetch_base"), recipe), recipe, artifacts("finetune"), ())


def write_base_answers() -> None:
    """Write an answer of the base model to every test row."""
    rows = read_rows(artifacts("split") / "test.parquet")
    answers = [Answer("none", 1, True, 1.0)] * len(rows)
    write_answers(artifacts("ask_base") / "answers.parquet", rows, answers)
    report = {"answer_limit_tokens": ANSWER_TOKENS, "engine": "paged", "references_over_limit": 0}
    write_json(reports("ask_base") / "metrics.json", {**report, "test_rows": len(rows)})


def read_card_rows() -> None:
    """Go through the rows as the model card does."""
    sides, problems = read_sides()
    assert not problems + check_rows(sides, {}, ())
    print(
        count_sources(sides), list_languages(join(join(sides["train"], sides["validation"]), sides["test"]))
    )


STEPS = {
    "base": write_base,
    "adapter": write_adapter,
    "answers": write_base_answers,
    "model_card": read_card_rows,
}


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("step", choices=STEPS)
    STEPS[parser.parse_args().step]()


if __name__ == "__main__":
    main()
