"""What factors of low rank would give: right answers and loss, beside leaving out channels to the same size.

    python -m benchmarks.low_rank [--rows 300] [--side test] [--shares 0.9 0.75 0.5] [--healing-rows 0]
        [--folder CHECKOUT] [--tiny] [--out low_rank.json]

Needs a checkout in which the pipeline has trained; --tiny makes a tiny model and rows. Each linear layer of
the blocks is replaced by its best approximation of the rank at which two factors have a share of its weights:
by the singular values of the weights alone (svd), or of the weights times the spread of their inputs on
training rows, so that the outputs change least (weighted; Wang et al. 2024, "SVD-LLM", arXiv:2403.07378). The
factors are multiplied back, which computes the same. With --healing-rows, what is left of each model (the
factors themselves) is trained on so many training rows, and it is asked again.

No file of this project could hold the factors (docs/adr/0022-a-smaller-model-takes-the-exports-place.md).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import chdir
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import make_tiny_split
from benchmarks.machine import machine
from services.engines.offline import answer_limit
from stages.common.artifacts import artifacts, write_json
from stages.common.chat.fitting import find_refused
from stages.common.chat.template import Encoded, encode_example
from stages.common.errors import InputError
from stages.common.logs import set_quiet_environment
from stages.common.model.blocks import check_shrinkable
from stages.common.model.generation import EvalPrompt, answer_questions, encode_questions
from stages.common.model.loading import load_base, load_tokenizer, load_tuned, pick_device
from stages.common.model.replaced import list_blocks
from stages.common.model.results import score
from stages.common.params.loading import Params, load_params
from stages.common.records import Row, read_rows
from stages.common.task.kinds import read_task
from stages.common.task.protocol import Task
from stages.compress.gptq import change_layers
from stages.compress.shrinking import drop_channels
from stages.compress.variants import draw_calibration

ROOT = Path(__file__).parents[1]
# Of the mean of the moments' diagonal: inputs that never vary; more where sums were rounded by more.
DAMPINGS = (1e-4, 1e-3, 1e-2, 1e-1)
HEALING_BATCH = 8  # rows of an update
MIB = 1 << 20

Weights = torch.Tensor
Factors = dict[str, tuple[Weights, Weights]]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is asked and trained, and a function that loads the trained model anew."""

    load: Callable[[], Any]
    tokenizer: Any
    task: Task
    rows: Sequence[Row]
    questions: Sequence[EvalPrompt]
    calibration: Sequence[list[int]]
    healing: Sequence[Encoded]
    params: Params


def main(words: Sequence[str] | None = None) -> int:
    """Make each model, ask it, and print the table."""
    set_quiet_environment()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.low_rank", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="a checkout in which the pipeline has run"
    )
    parser.add_argument("--rows", type=int, default=300, help="how many are asked, spread over the split")
    parser.add_argument("--side", choices=["validation", "test"], default="test", help="of which rows")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.9, 0.75, 0.5])
    parser.add_argument("--healing-rows", type=int, default=0, help="0: no model is trained on")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--out", type=Path, help="write the JSON object to this file")
    options = parser.parse_args(words)
    out = options.out.resolve() if options.out else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) if options.tiny else options.folder.resolve()
        params = load_params((ROOT if options.tiny else folder) / "params.yaml")
        if options.tiny:
            make_tiny_split(folder)
        try:
            with chdir(folder):
                found = measure(read_inputs(options, params), options.shares)
        except InputError as error:
            parser.error(str(error))
    if out:
        write_json(
            out,
            {"machine": machine(), "options": json.loads(json.dumps(vars(options), default=str)), **found},
        )
    sys.stdout.write(f"{machine()}\n\n{format_table(found)}\n")
    return 0


def read_inputs(options: argparse.Namespace, params: Params) -> Inputs:
    """Read model and rows in the folder of a checkout.

    Raises:
        InputError: the pipeline has not trained there.
    """
    base, adapter = artifacts("fetch_base"), artifacts("finetune")
    tokenizer = load_tokenizer(base)

    def load() -> Any:
        cpu = torch.device("cpu")
        return (
            load_base(base, torch.float32, cpu)
            if options.tiny
            else load_tuned(base, adapter, torch.float32, cpu)
        )

    every = read_rows(artifacts("split") / f"{'validation' if options.tiny else options.side}.parquet")
    refused = find_refused(tokenizer, every)
    rows = [row for row in every if row.id not in refused]
    rows = rows[:: max(1, len(rows) // options.rows)][: options.rows]
    train = read_rows(artifacts("split") / "train.parquet")
    settings, longest = params.compress, params.finetune.max_length
    refused = find_refused(tokenizer, train)
    usable = [row for row in train if row.id not in refused]
    chosen = random.Random(settings.seed).sample(usable, min(options.healing_rows, len(usable)))
    healing = [encode_example(tokenizer, row.messages, row.tools) for row in chosen]
    return Inputs(
        load,
        tokenizer,
        read_task(),
        rows,
        encode_questions(tokenizer, rows),
        draw_calibration(train, tokenizer, settings.calibration_rows or len(train), longest, settings.seed),
        [example for example in healing if len(example.input_ids) <= longest],
        params,
    )


def measure(inputs: Inputs, shares: Sequence[float]) -> dict[str, Any]:
    """Return what each model reaches, the trained one first."""
    whole = inputs.load()
    weights = sum(layer.weight.numel() for layer in list_layers(whole).values())
    lines = [{"model": "trained", "share": 1.0, "weights": weights, **judge(whole, inputs)}]
    tell(lines[-1])
    for share in shares:
        for name, make in make_contenders(inputs, share):
            started = time.perf_counter()
            model, left = make()
            line = {"model": name, "share": share, "weights": left, **judge(model, inputs)}
            if inputs.healing:
                heal(model, inputs)
                line["healed"] = judge(model, inputs)
            lines.append(line | {"seconds": round(time.perf_counter() - started, 1)})
            tell(lines[-1])
    return {"rows": len(inputs.rows), "primary": inputs.task.primary, "models": lines}


def tell(line: dict[str, Any]) -> None:
    """Show a result at once: all of them take hours."""
    sys.stderr.write(f"{json.dumps(line)}\n")


def make_contenders(inputs: Inputs, share: float) -> Iterator[tuple[str, Callable[[], tuple[Any, int]]]]:
    """Yield the name of each model of a share of the weights, and what makes it and counts them."""
    yield "svd", partial(factorise, inputs, share, is_weighted=False)
    yield "weighted", partial(factorise, inputs, share, is_weighted=True)
    if (kept := find_channels(inputs.load(), share)) is not None:
        yield "pruned", partial(prune, inputs, kept)


def list_layers(model: Any) -> dict[str, Any]:
    """Return the linear layers of the blocks by their names."""
    blocks = tuple(f"{name}." for name in list_blocks(model))
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks)
    }


def find_rank(outputs: int, inputs: int, share: float) -> int:
    """Return the rank at which two factors have at most a share of a layer's weights; at least 1."""
    return max(1, int(share * outputs * inputs / (outputs + inputs)))


def factorise(inputs: Inputs, share: float, is_weighted: bool) -> tuple[Any, int]:
    """Return the model with two factors in the place of each linear layer, and how many weights they have."""
    model, factors = inputs.load(), Factors()

    def change(weights: Weights, moments: Weights, name: str) -> Weights:
        height, width = weights.shape
        rank = find_rank(height, width, share)
        factors[name] = approximate(weights, moments if is_weighted else None, rank)
        return factors[name][0] @ factors[name][1]

    change_layers(model, inputs.calibration, change)
    for name, (left, right) in factors.items():
        layer = model.get_submodule(name)
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], join(left, right, layer.bias))
    return model, sum(left.numel() + right.numel() for left, right in factors.values())


def approximate(weights: Weights, moments: Weights | None, rank: int) -> tuple[Weights, Weights]:
    """Return the two factors [outputs, rank] and [rank, inputs] whose product is nearest to the weights.

    Args:
        moments: second moments of the inputs: the outputs on such inputs are nearest; None: the weights are.

    Raises:
        ArithmeticError: the moments are further from those of any inputs than rounding makes them.
    """
    if moments is None:
        left, values, right = torch.linalg.svd(weights, full_matrices=False)
        return left[:, :rank] * values[:rank], right[:rank]
    mean = moments.diagonal().mean().clamp(min=1e-8)
    for damping in DAMPINGS:
        damped = moments.double() + torch.eye(len(moments)).double() * damping * mean
        spread, problem = torch.linalg.cholesky_ex(damped)
        if not problem:
            break
    else:
        raise ArithmeticError(f"the moments of {len(moments)} inputs cannot be factorized, also damped")
    left, values, right = torch.linalg.svd(weights.double() @ spread, full_matrices=False)
    undone = torch.linalg.solve_triangular(spread, right[:rank], upper=False, left=False)
    return (left[:, :rank] * values[:rank]).float(), undone.float()


def join(left: Weights, right: Weights, bias: Weights | None) -> Any:
    """Return two linear layers, one after the other, of these weights."""
    inner = torch.nn.Linear(right.shape[1], len(right), bias=False)
    outer = torch.nn.Linear(left.shape[1], len(left), bias=bias is not None)
    with torch.no_grad():
        inner.weight.copy_(right)
        outer.weight.copy_(left)
        if bias is not None:
            outer.bias.copy_(bias)
    return torch.nn.Sequential(inner, outer).eval()


def find_channels(model: Any, share: float) -> float | None:
    """Return the share of channels with which the blocks have a share of their weights; None without one."""
    try:
        check_shrinkable(model.config, "pruned", model)
    except InputError:
        return None
    sizes = {name: layer.weight.numel() for name, layer in list_layers(model).items()}
    channels = sum(
        size for name, size in sizes.items() if name.endswith(("gate_proj", "up_proj", "down_proj"))
    )
    kept = 1 - (1 - share) * sum(sizes.values()) / channels
    return kept if kept > 0 else None


def prune(inputs: Inputs, kept: float) -> tuple[Any, int]:
    """Return the model with a share of its channels, and how many weights its linear layers have."""
    smaller, _ = drop_channels(inputs.load(), inputs.calibration, kept)
    return smaller, sum(layer.weight.numel() for layer in list_layers(smaller).values())


def heal(model: Any, inputs: Inputs) -> None:
    """Train the weights of the blocks on the answers of training rows: one pass, the rate falling to zero."""
    settings = inputs.params.compress
    learned = [weight for name in list_blocks(model) for weight in model.get_submodule(name).parameters()]
    optimizer = torch.optim.AdamW(learned, lr=settings.healing_rate, weight_decay=0.0)
    starts = range(0, len(inputs.healing), HEALING_BATCH)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(starts))
    for start in starts:
        batch = inputs.healing[start : start + HEALING_BATCH]
        count = sum(example.learned_count for example in batch)
        for example in batch:
            ids = torch.tensor([example.input_ids])
            logits = model(input_ids=ids, use_cache=False).logits[0, example.prompt_length - 1 : -1]
            wanted = ids[0, example.prompt_length :]
            loss = torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
            (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(learned, inputs.params.finetune.max_grad_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def judge(model: Any, inputs: Inputs) -> dict[str, float]:
    """Return the primary metric of a model's greedy answers, and the loss of a token of the references."""
    asks = inputs.params.ask_base
    limit = answer_limit(inputs.questions, asks.max_new_tokens)
    model.to(pick_device())
    answers = answer_questions(model, inputs.tokenizer, inputs.questions, asks.batch_size, limit)
    model.to("cpu")
    found = score(inputs.rows, inputs.questions, answers, inputs.task)
    tokens = sum(len(question.reference) for question in inputs.questions)
    return {
        "primary": round(found[inputs.task.primary].value(), 4),
        "loss": round(sum(answer.reference_loss for answer in answers) / tokens, 4),
    }


def format_table(found: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    healed = any("healed" in line for line in found["models"])
    head = ["model", "weights of the blocks", found["primary"], "loss"]
    head += [f"{found['primary']}, healed", "loss, healed"] if healed else []
    lines = [f"{found['rows']} rows\n", f"| {' | '.join(head)} |", f"|---|{'---:|' * (len(head) - 1)}"]
    for line in found["models"]:
        size = f"{line['weights']:,} ({line['weights'] / found['models'][0]['weights']:.0%})"
        cells = [f"{line['model']} {line['share']:g}", size, f"{line['primary']:.3f}", f"{line['loss']:.3f}"]
        if healed:
            after = line.get("healed")
            cells += [f"{after['primary']:.3f}", f"{after['loss']:.3f}"] if after else ["–", "–"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
