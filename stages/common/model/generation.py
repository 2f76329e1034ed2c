"""Asking a model many questions at once: greedy answers, and how likely it finds the right ones.

Written by hand instead of `generate`, because an untuned model writes to the limit while a tuned one stops
early: here a row leaves its batch when it ends, and the prompt is read once for both purposes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.common.artifacts import atomic_write
from stages.common.chat.calls import read_answer
from stages.common.chat.fitting import TOKEN_BYTES
from stages.common.chat.template import encode_example, encode_text, end_of_turn_ids
from stages.common.errors import InputError
from stages.common.model.label_head import find_labels, find_place
from stages.common.model.virtual_tokens import begin_cache, count_virtual_tokens
from stages.common.records import Row
from stages.common.spool import pick, spool

if TYPE_CHECKING:
    import torch

# The loss needs the logits of every reference token. So many at once take 100 MiB of a vocabulary of 50,000.
LOSS_TOKENS_AT_ONCE = 512


@dataclass(frozen=True, slots=True)
class EvalPrompt:
    """One row as token ids; with tools, its answer may be calls of them."""

    prompt: list[int]
    reference: list[int]
    has_tools: bool = False


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answers to one row.

    Attributes:
        tokens: how many it wrote, the end of turn not counted.
        complete: whether it ended by itself; if not, it was cut.
        reference_loss: summed negative log-likelihood of the reference and its end of turn, in nats.
    """

    text: str
    tokens: int
    complete: bool
    reference_loss: float


def encode_questions(tokenizer: Any, rows: Iterable[Row]) -> Sequence[EvalPrompt]:
    """Return prompt and reference of each row; the reference ends with the end of turn."""
    return spool((_encode_question(tokenizer, row) for row in rows), _count_bytes)


def _encode_question(tokenizer: Any, row: Row) -> EvalPrompt:
    example = encode_example(tokenizer, row.messages, row.tools)
    length = example.prompt_length
    return EvalPrompt(example.input_ids[:length], example.input_ids[length:], bool(row.tools))


def _count_bytes(question: EvalPrompt) -> int:
    return TOKEN_BYTES * (len(question.prompt) + len(question.reference))


def check_fit(questions: Sequence[EvalPrompt], max_new_tokens: int, context_tokens: int | None) -> None:
    """Raise InputError if prompt and answer of a row do not fit into the model's context."""
    if context_tokens is None:
        return
    longest = max(len(q.prompt) + max(len(q.reference), max_new_tokens) for q in questions)
    if longest > context_tokens:
        raise InputError(
            f"a test row takes {longest} tokens with its answer; the base model reads {context_tokens}",
            "lower curate.max_question_chars or ask_base.max_new_tokens, or choose another base model",
        )


def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[EvalPrompt],
    batch_size: int,
    max_new_tokens: int,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Return the greedy answer to each question, in order, and the loss of its reference.

    Prompts of similar length share a batch, the longest first: if memory is short, that shows at once.

    Args:
        max_new_tokens: where an answer is cut.
        on_progress: called with the number of questions answered so far.
    """
    import torch

    ends = end_of_turn_ids(tokenizer)
    labels = find_labels(model)
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i].prompt))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        with torch.inference_mode():
            prefilled = _prefill(model, [questions[i].prompt for i in batch], tokenizer.pad_token_id)
            if labels:
                chosen = _choose(tokenizer, prefilled, [questions[i] for i in batch], labels)
                answers |= dict(zip(batch, chosen, strict=True))
                on_progress(len(answers))
                continue
            losses = _reference_losses(model, prefilled, [questions[i].reference for i in batch])
            written = _write(model, prefilled, ends, max_new_tokens, _choose_likeliest)
        for i, loss, ids in zip(batch, losses, written, strict=True):
            complete = bool(ids) and ids[-1] in ends
            ids = ids[:-1] if complete else ids
            text = read_answer(tokenizer, ids, questions[i].has_tools)
            answers[i] = Answer(text, len(ids), complete, loss)
        on_progress(len(answers))
    return [answers[i] for i in range(len(questions))]


def sample_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    temperature: float,
    numbers: torch.Tensor,
) -> list[list[list[int]]]:
    """Return a group of answers to each prompt, drawn by the model's probabilities, up to their end or cut.

    Args:
        prompts: asked together; each is read once.
        numbers: what each token is drawn with, of [0, 1), by inverting the cumulated probabilities; shape
            (prompts, answers of a group, most tokens of an answer). Equal numbers give equal answers,
            whatever else is asked with them.

    Raises:
        FloatingPointError: the model's probabilities are not numbers.
    """
    import torch

    _, size, max_new_tokens = numbers.shape
    numbers = numbers.to(model.device).flatten(0, 1)

    def draw(logits: torch.Tensor, rows: Sequence[int], step: int) -> torch.Tensor:
        shares = torch.softmax(logits.float() / temperature, dim=-1)
        if not torch.isfinite(shares).all():
            raise FloatingPointError("the model's probabilities are not numbers")
        cumulated = shares.cumsum(dim=-1)
        # Of their sum, which rounding leaves a little above or below 1.
        wanted = numbers[list(rows), step, None] * cumulated[:, -1:]
        return torch.searchsorted(cumulated, wanted, right=True)[:, 0].clamp(max=shares.shape[-1] - 1)

    with torch.no_grad():
        state = _prefill(model, prompts, tokenizer.pad_token_id)
        state.repeat(size)
        found = _write(model, state, end_of_turn_ids(tokenizer), max_new_tokens, draw)
    return [found[first : first + size] for first in range(0, len(found), size)]


def measure_latencies(answer: Callable[[EvalPrompt], object], questions: Sequence[EvalPrompt]) -> list[float]:
    """Return the seconds that each question takes when it is asked alone."""
    seconds = []
    for question in questions:
        start = time.perf_counter()
        answer(question)
        seconds.append(time.perf_counter() - start)
    return seconds


def write_answers(path: Path, rows: Sequence[Row], answers: Sequence[Answer]) -> None:
    """Write the answers as Parquet, one row of the file for each test row, with its id."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_pylist(
        [{"id": row.id, **asdict(answer)} for row, answer in zip(rows, answers, strict=True)]
    )
    with atomic_write(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def read_answers(path: Path) -> dict[str, Answer]:
    """Return the answers that `write_answers` wrote, in their order, by the id of their test row.

    Raises:
        InputError: the file is missing, or is not one of these.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    fix = f"run the stage that writes it: dvc repro {path.parent.name}"
    try:
        records = pq.read_table(path).to_pylist()
        return {record.pop("id"): Answer(**record) for record in records}
    except (OSError, pa.ArrowInvalid, TypeError, KeyError) as error:
        raise InputError(f"{path} cannot be read: {error}", fix) from None


def pick_asked(all_rows: Sequence[Row], asked: Mapping[str, Answer]) -> Sequence[Row]:
    """Return the test rows that the base model was asked, in the order of its answers.

    Raises:
        InputError: a row is not in the test split.
    """
    places = {row.id: place for place, row in enumerate(all_rows) if row.id in asked}
    if unknown := [row_id for row_id in asked if row_id not in places]:
        raise InputError(
            f"the base model was asked {len(unknown)} rows that are not in the test split: {unknown[:3]}",
            "ask it again: dvc repro ask_base",
        )
    return pick(all_rows, [places[row_id] for row_id in asked])


@dataclass(slots=True)
class _Prefilled:
    """A batch whose prompts have been read.

    Attributes:
        logits: of the first token of each answer; shape (rows, vocabulary).
        mask: 1 where the cache holds a token, virtual ones too, 0 for padding; shape (rows, cached).
        positions: the position of each row's next token; shape (rows, 1).
    """

    cache: Any
    logits: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor

    def copied(self) -> _Prefilled:
        return _Prefilled(copy.deepcopy(self.cache), self.logits, self.mask, self.positions)

    def keep(self, rows: torch.Tensor) -> None:
        """Leave all but these rows, so that the others cost nothing any more."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]

    def repeat(self, times: int) -> None:
        """Have each row several times, one behind the other."""
        self.cache.batch_repeat_interleave(times)
        self.logits, self.mask, self.positions = (
            each.repeat_interleave(times, dim=0) for each in (self.logits, self.mask, self.positions)
        )

    def read(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """Read the next tokens of each row, shape (rows, n), and return the logits behind each."""
        import torch

        count = tokens.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), count)], dim=1)
        steps = torch.arange(count, device=tokens.device)
        out = model(
            input_ids=tokens,
            attention_mask=self.mask,
            position_ids=self.positions + steps,
            past_key_values=self.cache,
            use_cache=True,
        )
        self.cache = out.past_key_values
        self.positions = self.positions + count
        return out.logits  # type: ignore[no-any-return]


def _prefill(model: Any, prompts: Sequence[list[int]], pad: int) -> _Prefilled:
    """Read prompts of different lengths, padded on the left so that all end at the same place."""
    import torch

    width, virtual = max(map(len, prompts)), count_virtual_tokens(model)
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor(
        [[1] * virtual + [0] * (width - len(p)) + [1] * len(p) for p in prompts], device=model.device
    )
    out = model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(dim=1) - 1).clamp(min=0)[:, virtual:],
        past_key_values=begin_cache(model, len(prompts)),
        use_cache=True,
        # Not `1`: that takes a view, and on a CPU torch then copies the whole output layer once a row
        # if its weights are frozen, as peft leaves them: 3.6 GB and ten seconds for 64 rows.
        logits_to_keep=torch.tensor([width - 1], device=model.device),
    )
    return _Prefilled(out.past_key_values, out.logits[:, -1], mask, mask.sum(dim=1, keepdim=True))


def _reference_losses(model: Any, prefilled: _Prefilled, references: Sequence[list[int]]) -> list[float]:
    """Return the summed loss of each reference, which is read slice by slice behind the prompts."""
    import torch

    state = prefilled.copied()
    lengths = [len(r) for r in references]
    losses = torch.zeros(len(references), dtype=torch.float64)
    first = torch.tensor([r[0] for r in references], device=model.device)
    losses += _nll(prefilled.logits, first)
    rows = list(range(len(references)))
    start = 0
    while True:
        # The last token predicts nothing: what is read is each reference without it.
        still = [place for place, row in enumerate(rows) if lengths[row] - 1 > start]
        if not still:
            return [float(loss) for loss in losses]
        if len(still) < len(rows):
            state.keep(torch.tensor(still, device=model.device))
            rows = [rows[place] for place in still]
        stop = min(max(lengths[row] for row in rows) - 1, start + max(1, LOSS_TOKENS_AT_ONCE // len(rows)))
        width = stop - start
        read = [references[row][start : min(stop, lengths[row] - 1)] for row in rows]
        padded = torch.tensor([r + [0] * (width - len(r)) for r in read], device=model.device)
        logits = state.read(model, padded)
        for place, row in enumerate(rows):
            wanted = torch.tensor(
                references[row][start + 1 : start + 1 + len(read[place])], device=model.device
            )
            losses[row] += _nll(logits[place, : len(wanted)], wanted).sum()
        start = stop


def _choose(
    tokenizer: Any, prefilled: _Prefilled, questions: Sequence[EvalPrompt], labels: Sequence[str]
) -> list[Answer]:
    """Return the likeliest label behind each prompt of a batch, and the loss of the reference."""
    ends = end_of_turn_ids(tokenizer)
    references = [
        find_place(read_answer(tokenizer, [t for t in q.reference if t not in ends], q.has_tools), labels)
        for q in questions
    ]
    targets = prefilled.logits.new_tensor(references).long()
    losses = _nll(prefilled.logits, targets).tolist()
    chosen = [labels[place] for place in prefilled.logits.argmax(dim=-1).tolist()]
    return [
        Answer(label, len(encode_text(tokenizer, label)), True, loss)
        for label, loss in zip(chosen, losses, strict=True)
    ]


def _nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of each target, in float32 whatever the model computes in."""
    import torch

    losses = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
    return losses.cpu().double()  # in this order: Metal has no float64


def _choose_likeliest(logits: torch.Tensor, rows: Sequence[int], step: int) -> torch.Tensor:
    return logits.argmax(dim=-1)


def _write(
    model: Any,
    state: _Prefilled,
    ends: Sequence[int],
    max_new_tokens: int,
    choose: Callable[[torch.Tensor, Sequence[int], int], torch.Tensor],
) -> list[list[int]]:
    """Return what each row writes, up to and with an end of turn or up to the limit.

    Args:
        choose: returns the next token of each row that still writes, from logits of shape (rows, words), the
            numbers of these rows, and that of the token.
    """
    import torch

    written: list[list[int]] = [[] for _ in range(len(state.mask))]
    rows = list(range(len(written)))
    logits = state.logits
    for step in range(max_new_tokens):
        tokens = choose(logits, rows, step)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            written[row].append(token)
        still = [place for place, row in enumerate(rows) if written[row][-1] not in ends]
        if not still or step == max_new_tokens - 1:
            break
        if len(still) < len(rows):
            kept = torch.tensor(still, device=tokens.device)
            state.keep(kept)
            rows, tokens = [rows[place] for place in still], tokens[kept]
        logits = state.read(model, tokens[:, None])[:, -1]
    return written
