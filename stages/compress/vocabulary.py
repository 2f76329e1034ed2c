"""Leave out the tokens of a model that training rows do not have: rows of the embedding and output layer.

The weights that are left are those of the whole model. So a text of kept tokens gets the very numbers that it
had, and nothing has to be trained again: training rows are such texts.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

from stages.common.artifacts import artifacts, read_json, write_json
from stages.common.chat.fitting import describe_misfits, select_askable
from stages.common.chat.template import TemplateRefusal, encode_example
from stages.common.errors import InputError
from stages.common.gguf.trimming import choose_tokens, describe_tokenizer, renumber_settings, trim_tokenizer
from stages.common.model.draft_corpus import CORPUS, read_corpus, write_corpus
from stages.common.model.exported import TOKENIZER_FILES
from stages.common.model.loading import load_tokenizer
from stages.common.records import Row
from stages.common.spool import view
from stages.compress.shrinking import keep_tokens, list_token_ids


def cut_vocabulary(
    model: Any, tokenizer: Any, train: Sequence[Row], others: Sequence[Row], share: float, folder: Path
) -> tuple[Any, dict[str, Any]]:
    """Return the model without the tokens that are not needed, and what was done.

    Writes into the folder what of an export depends on the ids: configuration, tokenizer, draft corpus.

    Args:
        train: rows whose tokens are all kept.
        others: rows that show how much longer other texts become.
        share: of the merges that are kept besides (`choose_tokens`).

    Raises:
        InputError: the smaller tokenizer cuts a training row in another way.
    """
    used = {*list_token_ids(model), *tokenizer.all_special_ids, *encode_template(tokenizer)}
    for ids in _encode_rows(tokenizer, train):
        used.update(ids)
    kept = choose_tokens(describe_tokenizer(tokenizer), used, share)
    smaller = keep_tokens(model, kept)
    smaller.config.save_pretrained(folder)
    _write_tokenizer(tokenizer, kept, folder)
    own = load_tokenizer(folder)
    check_alike(tokenizer, own, kept, train)
    places = {old: new for new, old in enumerate(kept)}
    if (artifacts("export") / CORPUS).exists():
        corpus = read_corpus(artifacts("export") / CORPUS)
        write_corpus(
            folder / CORPUS,
            [([places[n] for n in prompt], [places[n] for n in answer]) for prompt, answer in corpus],
        )
    before, after = (sum(map(len, _encode_rows(one, others))) for one in (tokenizer, own))
    return smaller, {"tokens": len(kept), "longer_texts": round(after / before, 4) if before else None}


def encode_template(tokenizer: Any) -> set[int]:
    """Return the ids of all texts that the chat template can write by itself."""
    found: set[int] = set()
    for text in _list_literals(str(tokenizer.chat_template)):
        found.update(tokenizer(text, add_special_tokens=False)["input_ids"])
    return found


def _list_literals(template: str) -> Iterator[str]:
    from jinja2 import Environment

    lexer = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).lexer
    for token in lexer.tokenize(template):
        if token.type in ("data", "string"):
            yield str(token.value)


def _encode_rows(tokenizer: Any, rows: Iterable[Row]) -> Iterator[list[int]]:
    """Yield the token ids of each answer with what is before it, but of those that the template refuses."""
    for row in rows:
        turns = [n for n, message in enumerate(row.messages) if message.role == "assistant"]
        texts = [row.messages[: turn + 1] for turn in turns]
        for messages in [*texts, *([[*row.messages[:-1], row.rejected]] if row.rejected else [])]:
            try:
                yield encode_example(tokenizer, messages, row.tools).input_ids
            except TemplateRefusal:
                continue


def _write_tokenizer(tokenizer: Any, kept: Sequence[int], folder: Path) -> None:
    from tokenizers import Tokenizer

    trimmed = trim_tokenizer(describe_tokenizer(tokenizer), kept)
    Tokenizer.from_str(json.dumps(trimmed)).save(str(folder / "tokenizer.json"))
    if (settings := artifacts("export") / "tokenizer_config.json").exists():
        write_json(folder / settings.name, renumber_settings(read_json(settings), kept))
    complete_tokenizer(folder)


def complete_tokenizer(folder: Path) -> None:
    """Copy what the folder lacks of the export's configuration and tokenizer."""
    for name in TOKENIZER_FILES:
        if (artifacts("export") / name).exists() and not (folder / name).exists():
            shutil.copyfile(artifacts("export") / name, folder / name)


def check_room(
    whole: Any, own: Any, rows: Iterable[Row], max_new_tokens: int, context_tokens: int | None
) -> None:
    """Check that each row that can be asked in the whole vocabulary can be asked in the smaller one, too.

    Args:
        max_new_tokens, context_tokens: as for `select_askable`.

    Raises:
        InputError: one is too long in it.
    """
    askable, _ = select_askable(whole, rows, max_new_tokens, context_tokens)
    _, misfits = select_askable(own, view(askable, itemgetter(0)), max_new_tokens, context_tokens)
    if misfits:
        raise InputError(
            f"{len(misfits)} validation or test rows have no room in the context in a small vocabulary:\n"
            f"{describe_misfits(misfits, 3)}",
            "raise compress.kept_tokens, or take small_vocabulary out of compress.variants",
        )


def check_alike(whole: Any, own: Any, kept: Sequence[int], rows: Sequence[Row]) -> None:
    """Check that the tokens of the smaller tokenizer are those that are kept, and cut rows as the whole one.

    Raises:
        InputError: they are not.
    """
    texts = {number: text for text, number in whole.get_vocab().items()}
    wanted = {texts[old]: new for new, old in enumerate(kept)}
    cut = zip(_encode_rows(whole, rows), _encode_rows(own, rows), strict=True)
    if own.get_vocab() != wanted or any(ids != [kept[n] for n in new] for ids, new in cut):
        raise InputError(
            "the base model's tokenizer cuts training rows in another way once it has fewer tokens",
            "take small_vocabulary out of compress.variants",
        )
