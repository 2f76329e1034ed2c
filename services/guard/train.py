"""Train the guard's two text classifiers on the sentences in `data/`, written for this project.

    python -m services.guard.train [--check]

Reads train_attack.csv, train_toxic.csv and train_benign.csv (family, text; `{a|b}` is a choice) and writes
injection.npz and toxicity.npz to the same folder. The held-out files are used by `python -m benchmarks.guard`
only. Thresholds come from cross-validation over templates. Training is deterministic for equal files and
seed. `--check` compares with the stored weights instead of writing them.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
import math
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from services.guard.text_classifier import (
    BUCKETS,
    TextClassifier,
    hash_ngrams,
    load_classifier,
    normalise,
    save_classifier,
    split_windows,
)

DATA = Path(__file__).parent / "data"
SEED = 7
# Sentences drawn per template; more would repeat the same words in another order.
ATTACK_DRAWS, BENIGN_DRAWS = 16, 16
LONG_TEXTS = 400  # of several sentences, because windows of long texts look different
L2 = 3e-4
ROUNDS = 2  # after the first, an attack is learned from its highest-scoring windows only
FOLDS = 5
MAX_FALSE_ALARMS = 0.01  # share of benign texts, in cross-validation
CHOICE = re.compile(r"\{([^{}]*)\}")

Floats = npt.NDArray[np.float32]
logger = logging.getLogger("services.guard.train")


@dataclass(frozen=True, slots=True)
class Example:
    """A training text; `fold_key` keeps sentences of one template in one fold."""

    text: str
    attack: bool
    fold_key: str


def read_templates(path: Path) -> list[tuple[str, str]]:
    """Read (family, template) pairs from a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["family"], row["text"]) for row in csv.DictReader(file)]


def draw_sentences(template: str, most: int, rng: random.Random) -> list[str]:
    """Draw up to `most` different sentences from a template, each choice about equally often."""
    parts = CHOICE.split(template)  # odd places hold choices
    choices = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    if math.prod(len(choice) for choice in choices) <= most:
        return ["".join(picked) for picked in itertools.product(*choices)]
    drawn: dict[str, None] = {}
    while len(drawn) < most:
        drawn["".join(rng.choice(choice) for choice in choices)] = None
    return list(drawn)


def build_examples(attacks: Path, benign: Path, seed: int) -> list[Example]:
    """Return the training texts: attacks, benign sentences and benign paragraphs."""
    rng = random.Random(seed)
    bad = [
        Example(text, True, template)
        for _, template in read_templates(attacks)
        for text in draw_sentences(template, ATTACK_DRAWS, rng)
    ]
    good = [
        Example(text, False, template)
        for _, template in read_templates(benign)
        for text in draw_sentences(template, BENIGN_DRAWS, rng)
    ]
    by_fold: dict[int, list[str]] = {}
    for example in good:
        by_fold.setdefault(get_fold(example.fold_key), []).append(example.text)
    long = []
    for number in range(LONG_TEXTS):
        fold = number % FOLDS
        sentences = [rng.choice(by_fold[fold]) for _ in range(rng.randint(3, 12))]
        long.append(Example(" ".join(sentences), False, f"fold {fold}"))
    return bad + good + long


def get_fold(key: str) -> int:
    """Return the fold of a template, or of a paragraph built from one fold."""
    if key.startswith("fold "):
        return int(key.removeprefix("fold "))
    return sum(key.encode()) % FOLDS


@dataclass(frozen=True, slots=True)
class Windows:
    """All windows of all texts: a sparse matrix of n-gram counts, scaled by 1/sqrt(n-grams in the window)."""

    rows: npt.NDArray[np.int64]  # window of each entry
    columns: npt.NDArray[np.int64]
    values: Floats
    text_of: npt.NDArray[np.int64]  # text of each window


def build_windows(texts: Sequence[str]) -> Windows:
    """Return the features of all windows of the texts."""
    rows, columns, values, text_of = [], [], [], []
    window = 0
    for number, text in enumerate(texts):
        normalised = normalise(text)
        buckets, ends = hash_ngrams(normalised)
        for start, stop in sorted(
            set(zip(*(place.tolist() for place in split_windows(len(normalised))), strict=True))
        ):
            inside = buckets[(ends >= start) & (ends < stop)]
            unique, counts = np.unique(inside, return_counts=True)
            rows.append(np.full(unique.size, window))
            columns.append(unique)
            values.append((counts / np.sqrt(max(1, inside.size))).astype(np.float32))
            text_of.append(number)
            window += 1
    return Windows(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), np.array(text_of))


def fit_classifier(data: Windows, attack: npt.NDArray[np.bool_], l2: float) -> tuple[Floats, float]:
    """Return weights and bias of a logistic regression on windows (multiple-instance learning).

    Every window of a benign text is benign, but only some windows of an attack need be attacks. The first
    round trains on all of them, later rounds on the highest-scoring window of each attack.
    """
    from scipy import sparse

    matrix = sparse.csr_matrix((data.values, (data.rows, data.columns)), (data.text_of.size, BUCKETS))
    label = attack[data.text_of]
    use = np.ones(label.size, dtype=bool)
    weights, bias = np.zeros(BUCKETS, np.float32), 0.0
    for number in range(ROUNDS):
        if number:
            scores = matrix @ weights + bias
            worst = np.full(attack.size, -np.inf)
            np.maximum.at(worst, data.text_of, scores)
            use = ~label | (scores >= worst[data.text_of] - 1e-6)
        weights, bias = _logistic(matrix[use], label[use], l2)
    return weights, bias


def _logistic(matrix: object, label: npt.NDArray[np.bool_], l2: float) -> tuple[Floats, float]:
    """Return the weights that minimise the class-balanced mean log loss plus L2."""
    from scipy.optimize import minimize

    target = np.where(label, 1.0, -1.0)
    share = np.where(label, 0.5 / label.sum(), 0.5 / (~label).sum())

    def loss(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights, bias = point[:-1], point[-1]
        margin = target * (matrix @ weights + bias)  # type: ignore[operator]
        pull = -target * share / (1 + np.exp(np.clip(margin, -50, 50)))
        value = float(share @ np.logaddexp(0, -margin)) + l2 / 2 * float(weights @ weights)
        gradient = np.concatenate((matrix.T @ pull + l2 * weights, [pull.sum()]))  # type: ignore[attr-defined]
        return value, gradient

    found = minimize(loss, np.zeros(BUCKETS + 1), jac=True, method="L-BFGS-B", options={"maxiter": 200})
    return found.x[:-1].astype(np.float32), float(found.x[-1])


def score_texts(data: Windows, weights: Floats, bias: float, texts: int) -> npt.NDArray[np.float64]:
    """Return the highest window score of every text."""
    each = np.bincount(data.rows, weights[data.columns] * data.values, data.text_of.size) + bias
    worst = np.full(texts, -np.inf)
    np.maximum.at(worst, data.text_of, each)
    return worst


def train_classifier(attacks: Path, benign: Path, seed: int = SEED, l2: float = L2) -> TextClassifier:
    """Train on all examples; the threshold comes from out-of-fold scores."""
    all_examples = build_examples(attacks, benign, seed)
    attack = np.array([example.attack for example in all_examples])
    folds = np.array([get_fold(example.fold_key) for example in all_examples])
    data = build_windows([example.text for example in all_examples])
    unseen = np.zeros(attack.size)
    for fold in range(FOLDS):
        part = _select_texts(data, folds != fold)
        weights, bias = fit_classifier(part, attack, l2)
        unseen[folds == fold] = score_texts(data, weights, bias, attack.size)[folds == fold]
    threshold = float(np.quantile(unseen[~attack], 1 - MAX_FALSE_ALARMS, method="higher"))
    logger.info(
        "%s: %d attacks, %d benign; cross-validation: recall %.3f, false alarms %.3f, threshold %.3f",
        attacks.stem,
        attack.sum(),
        (~attack).sum(),
        (unseen[attack] > threshold).mean(),
        (unseen[~attack] > threshold).mean(),
        threshold,
    )
    weights, bias = fit_classifier(data, attack, l2)
    return TextClassifier(weights, bias, threshold)


def _select_texts(data: Windows, keep: npt.NDArray[np.bool_]) -> Windows:
    """Return the windows of the texts to keep; texts are not renumbered."""
    kept = keep[data.text_of]
    renumbered = np.cumsum(kept) - 1
    entries = kept[data.rows]
    return Windows(
        renumbered[data.rows[entries]], data.columns[entries], data.values[entries], data.text_of[kept]
    )


def main() -> int:
    """Train both classifiers; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="compare with the stored weights instead of writing them"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    same = True
    for name, attacks in (("injection", "train_attack.csv"), ("toxicity", "train_toxic.csv")):
        model = train_classifier(DATA / attacks, DATA / "train_benign.csv")
        path = DATA / f"{name}.npz"
        if options.check:
            stored = load_classifier(path)
            near = bool(np.allclose(stored.weights, model.weights, atol=0.02 * np.abs(model.weights).max()))
            logger.info("%s %s", path.name, "matches training" if near else "differs from training")
            same = same and near
        else:
            save_classifier(path, model)
            logger.info("wrote %s, %d bytes", path.name, path.stat().st_size)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
