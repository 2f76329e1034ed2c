"""The recipe of a training run, and the fingerprint of everything that decides its result."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from stages.common.artifacts import hash_file
from stages.common.chat.template import Encoded
from stages.common.model.adapter import InitialAdapter
from stages.common.records import format_canonical_json

# Modules of stages/common that decide the adapter, besides all files of this folder.
SHARED_CODE = tuple(
    f"model/{name}.py"
    for name in ("adapter", "generation", "label_head", "loading", "replaced", "targets", "virtual_tokens")
)
# Where early stopping or rewards decide, also how answers are read and scored.
SCORING_CODE = ("chat/*.py", "task/*.py")


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the adapter, besides the rows and the base model. See `finetune` in `params.yaml`."""

    method: str
    trained_modules: int | tuple[str, ...]
    rank: int
    alpha: float
    dropout: float
    target_modules: str | tuple[str, ...]
    num_virtual_tokens: int
    prompt_tuning_init: str
    prompt_tuning_init_text: str | None
    prefix_tuning_init: str
    learning_rate: float
    schedule: str
    warmup_fraction: float
    weight_decay: float
    adam_beta2: float
    max_grad_norm: float
    batch_size: int
    gradient_accumulation: int
    epochs: int
    dtype: str
    seed: int
    beta: float
    desirable_weight: float
    undesirable_weight: float
    distill: str
    teacher_weight: float
    temperature: float
    group_size: int
    rewards: Mapping[str, float]
    kl_weight: float
    epsilon: float
    labels: tuple[str, ...] = ()  # of the task, for the method head


def compute_fingerprint(
    recipe: Recipe,
    examples: Sequence[Encoded],
    base: Path,
    initial: InitialAdapter | None = None,
    watched: Mapping[str, Any] | None = None,
    marks: Any = (),
) -> str:
    """Return a hash of everything that decides the result: recipe, rows, base, code, library versions.

    Checkpoints are kept under it, so a run never resumes from those of another recipe. The number of
    processes is not part of it: it changes only the order of sums, so a run may resume with another number.

    Args:
        watched: what is asked during the training, and when it stops.
        marks: what else decides a run, of the objective.
    """
    here = Path(__file__).resolve().parent
    common = here.parent / "common"
    stops_early = watched is not None and watched["stopping"] is not None
    scores = stops_early or recipe.method == "grpo"
    patterns = (*SHARED_CODE, *(SCORING_CODE if scores else ()))
    shared = sorted(path for pattern in patterns for path in common.glob(pattern))
    packages = ["torch", "transformers", "peft", "accelerate"]
    packages += ["bitsandbytes"] if recipe.method == "qlora" else []
    parts = {
        "recipe": asdict(recipe),
        "rows": _hash_examples(examples),
        "marks": marks,
        "base": {p.name: hash_file(p) for p in sorted(base.iterdir()) if p.is_file()},
        "watched": watched,
        "initial": {p.name: hash_file(p) for p in initial.files} if initial else {},
        "code": {str(p.relative_to(here)): hash_file(p) for p in sorted(here.rglob("*.py"))},
        "shared_code": {str(p.relative_to(common)): hash_file(p) for p in shared},
        "versions": {name: version(name) for name in packages},
    }
    return hashlib.sha256(format_canonical_json(parts).encode()).hexdigest()[:16]


def _hash_examples(examples: Sequence[Encoded]) -> str:
    """Return the hash of a JSON list of what is learned and token ids, which is never all in memory."""
    digest = hashlib.sha256(b"[")
    for number, example in enumerate(examples):
        comma = ", " if number else ""
        parts = [example.prompt_length, example.input_ids, *example.given]
        digest.update((comma + json.dumps(parts)).encode())
    digest.update(b"]")
    return digest.hexdigest()
