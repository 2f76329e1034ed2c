"""Train the guard's two text models from the sentences in `guard_data/`, written for this project.

    python -m services.guard.train [--check]

Reads train_attack.csv, train_toxic.csv and train_benign.csv (family, text; `{a|b}` stands for either), and
writes injection.npz and toxicity.npz beside them. The held-out files are not looked at: they are for
`python -m benchmarks.guard`. The threshold comes from cross-validation over templates. Same files and seed:
same weights. `--check` trains and compares, and writes nothing.
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

from services.guard.text_classifier import BUCKETS, TextModel, features, load, normalise, save, windows

DATA = Path(__file__).parent / "data"
SEED = 7
# Sentences drawn from one template: more say the same words in other orders.
ATTACK_DRAWS, BENIGN_DRAWS = 16, 16
LONG_TEXTS = 400  # of several sentences, because windows of long texts are a kind of text of their own
L2 = 3e-4
ROUNDS = 2  # in each, an attack is learned from the windows that the last one found the worst
FOLDS = 5
MAX_FALSE_ALARMS = 0.01  # of benign texts, by cross-validation
CHOICE = re.compile(r"\{([^{}]*)\}")

Floats = npt.NDArray[np.float32]
logger = logging.getLogger("guard_training")


@dataclass(frozen=True, slots=True)
class Example:
    """A training text; `fold_key` keeps what was drawn from one template on one side."""

    text: str
    attack: bool
    fold_key: str


def read_templates(path: Path) -> list[tuple[str, str]]:
    """Return (family, template) of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        return [(row["family"], row["text"]) for row in csv.DictReader(file)]


def draw(template: str, most: int, rng: random.Random) -> list[str]:
    """Return up to `most` different sentences of a template, each choice about equally often."""
    parts = CHOICE.split(template)  # odd places hold choices
    choices = [part.split("|") if place % 2 else [part] for place, part in enumerate(parts)]
    if math.prod(len(choice) for choice in choices) <= most:
        return ["".join(picked) for picked in itertools.product(*choices)]
    drawn: dict[str, None] = {}
    while len(drawn) < most:
        drawn["".join(rng.choice(choice) for choice in choices)] = None
    return list(drawn)


def examples(attacks: Path, benign: Path, seed: int) -> list[Example]:
    """Return what a model learns from: sentences, benign paragraphs, and attacks inside such paragraphs."""
    rng = random.Random(seed)
    bad = [
        Example(text, True, template)
        for _, template in read_templates(attacks)
        for text in draw(template, ATTACK_DRAWS, rng)
    ]
    good = [
        Example(text, False, template)
        for _, template in read_templates(benign)
        for text in draw(template, BENIGN_DRAWS, rng)
    ]
    by_fold: dict[int, list[str]] = {}
    for example in good:
        by_fold.setdefault(fold_of(example.fold_key), []).append(example.text)
    long = []
    for number in range(LONG_TEXTS):
        fold = number % FOLDS
        sentences = [rng.choice(by_fold[fold]) for _ in range(rng.randint(3, 12))]
        long.append(Example(" ".join(sentences), False, f"fold {fold}"))
    return bad + good + long


def fold_of(key: str) -> int:
    """Return the fold of a template, or of a paragraph of one fold's sentences."""
    if key.startswith("fold "):
        return int(key.removeprefix("fold "))
    return sum(key.encode()) % FOLDS


@dataclass(frozen=True, slots=True)
class Bags:
    """All windows of all texts: a sparse matrix of n-gram counts over roots of the window's size."""

    rows: npt.NDArray[np.int64]  # window of each entry
    columns: npt.NDArray[np.int64]
    values: Floats
    text_of: npt.NDArray[np.int64]  # text of each window


def bags(texts: Sequence[str]) -> Bags:
    """Return the windows of the texts as the model sees them."""
    rows, columns, values, text_of = [], [], [], []
    window = 0
    for number, text in enumerate(texts):
        normalised = normalise(text)
        buckets, ends = features(normalised)
        for start, stop in sorted(
            set(zip(*(place.tolist() for place in windows(len(normalised))), strict=True))
        ):
            inside = buckets[(ends >= start) & (ends < stop)]
            unique, counts = np.unique(inside, return_counts=True)
            rows.append(np.full(unique.size, window))
            columns.append(unique)
            values.append((counts / np.sqrt(max(1, inside.size))).astype(np.float32))
            text_of.append(number)
            window += 1
    return Bags(np.concatenate(rows), np.concatenate(columns), np.concatenate(values), np.array(text_of))


def fit(data: Bags, attack: npt.NDArray[np.bool_], l2: float) -> tuple[Floats, float]:
    """Return weights and bias of a logistic regression on windows.

    All windows of a benign text are benign. Of an attack at least one is not: the first round takes all, the
    next ones those that the weights so far find the worst.
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
    """Return the weights that minimise the mean log loss, both classes counted alike, plus L2."""
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


def worst_scores(data: Bags, weights: Floats, bias: float, texts: int) -> npt.NDArray[np.float64]:
    """Return the score of every text: that of its worst window."""
    each = np.bincount(data.rows, weights[data.columns] * data.values, data.text_of.size) + bias
    worst = np.full(texts, -np.inf)
    np.maximum.at(worst, data.text_of, each)
    return worst


def train(attacks: Path, benign: Path, seed: int = SEED, l2: float = L2) -> TextModel:
    """Return a model of all examples, its threshold from texts that were unseen when they were scored."""
    all_examples = examples(attacks, benign, seed)
    attack = np.array([example.attack for example in all_examples])
    folds = np.array([fold_of(example.fold_key) for example in all_examples])
    data = bags([example.text for example in all_examples])
    unseen = np.zeros(attack.size)
    for fold in range(FOLDS):
        part = _of_texts(data, folds != fold)
        weights, bias = fit(part, attack, l2)
        unseen[folds == fold] = worst_scores(data, weights, bias, attack.size)[folds == fold]
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
    weights, bias = fit(data, attack, l2)
    return TextModel(weights, bias, threshold)


def _of_texts(data: Bags, keep: npt.NDArray[np.bool_]) -> Bags:
    """Return the windows of the texts to keep; texts keep their numbers."""
    kept = keep[data.text_of]
    renumbered = np.cumsum(kept) - 1
    entries = kept[data.rows]
    return Bags(
        renumbered[data.rows[entries]], data.columns[entries], data.values[entries], data.text_of[kept]
    )


def main() -> int:
    """Train both models; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare with the stored weights, write nothing")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s", stream=sys.stderr)
    same = True
    for name, attacks in (("injection", "train_attack.csv"), ("toxicity", "train_toxic.csv")):
        model = train(DATA / attacks, DATA / "train_benign.csv")
        path = DATA / f"{name}.npz"
        if options.check:
            stored = load(path)
            near = bool(np.allclose(stored.weights, model.weights, atol=0.02 * np.abs(model.weights).max()))
            logger.info("%s %s", path.name, "is as trained" if near else "differs from what training gives")
            same = same and near
        else:
            save(path, model)
            logger.info("wrote %s, %d bytes", path.name, path.stat().st_size)
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
