"""Write six data sets in formats that users have, for `benchmarks.own_data`.

Sentences come from the package home-assistant-intents (Apache-2.0), in several languages; commands from a
clone of tldr-pages/tldr (CC-BY-4.0), instructions from one of hiyouga/LLaMA-Factory (Apache-2.0), if given.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "sv")
SENTENCES_PER_TEMPLATE = 60
# Names that are the same in all of these languages.
NAMES = ("Atelier", "Loft", "Studio", "Radio", "Bar", "Salon", "Lego", "Anna", "Max", "Otto", "Disco", "Gong")
COMMAND_ROWS = 6000
LABEL_ROWS, LABELS = 10_000, 77
MANY_ROWS, MANY_SENTENCES = 100_000, 1500
SMALL_ROWS = 60
CHAT_ROWS = 1500


@dataclass(frozen=True)
class DataSet:
    """A data set: its name, the file in it, its licence, and its rows."""

    name: str
    path: Path
    license: str
    rows: int


def write_data_sets(
    folder: Path, tldr: Path | None, llama_factory: Path | None, only: Sequence[str] = ()
) -> list[DataSet]:
    """Write the data sets whose sources are given; equal sources give equal bytes.

    Args:
        only: names of files without their suffix; empty for all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Callable[[], DataSet]] = {
        "anfragen": lambda: write_small(folder),
        "labels": lambda: write_labels(folder / "labels.csv.gz", LABEL_ROWS, SENTENCES_PER_TEMPLATE),
        "many": lambda: write_labels(folder / "many.csv.gz", MANY_ROWS, MANY_SENTENCES),
        "openai": lambda: write_chats(folder),
    }
    if tldr:
        writers["commands"] = lambda: write_commands(folder, tldr)
    if llama_factory:
        writers["alpaca"] = lambda: write_alpaca(folder, llama_factory)
    return [write() for name, write in writers.items() if not only or name in only]


def sample_sentences(
    languages: Sequence[str], per_template: int = SENTENCES_PER_TEMPLATE
) -> Iterator[tuple[str, str]]:
    """Yield sentences and their labels, the language and the intent."""
    import home_assistant_intents
    from hassil.parse_expression import parse_sentence
    from hassil.sample import sample_expression

    rng = random.Random(7)
    data = Path(home_assistant_intents.__file__).parent / "data"
    for language in languages:
        package = json.loads((data / f"{language}.json").read_text(encoding="utf-8"))
        rules = {name: parse_sentence(body) for name, body in package["expansion_rules"].items()}
        for intent, body in package["intents"].items():
            label = f"{language}_{intent.removeprefix('Hass')}"
            for template in (sentence for block in body["data"] for sentence in block["sentences"]):
                expression = parse_sentence(template).expression
                drawn = sample_expression(expression, None, rules, expand_lists=False)
                for _, text in zip(range(per_template), drawn, strict=False):
                    yield fill_marks(text, rng), label


def fill_marks(text: str, rng: random.Random) -> str:
    """Return a sentence with values for its placeholders, such as `{area}` or `{brightness:level}`."""

    def value(mark: re.Match[str]) -> str:
        is_name = re.search(r"name|area|floor|item|query|message|title|artist", mark.group(1))
        return rng.choice(NAMES) if is_name else str(rng.randint(2, 98))

    return " ".join(re.sub(r"\{([^}]*)\}", value, text).split())


def draw(rows: Iterable[tuple[str, str]], number: int, labels: int, seed: int) -> list[tuple[str, str]]:
    """Return `number` different rows of the `labels` most frequent labels, as balanced as possible."""
    by_label: dict[str, list[str]] = {}
    for text, label in dict.fromkeys(rows):
        by_label.setdefault(label, []).append(text)
    largest = sorted(by_label, key=lambda label: (-len(by_label[label]), label))[:labels]
    rng = random.Random(seed)
    pools = {label: rng.sample(by_label[label], len(by_label[label])) for label in sorted(largest)}
    drawn: list[tuple[str, str]] = []
    while len(drawn) < number and any(pools.values()):
        drawn += [(pool.pop(), label) for label, pool in pools.items() if pool]
    rng.shuffle(drawn)
    return drawn[:number]


def write_small(folder: Path) -> DataSet:
    """Write 60 German rows as a spreadsheet exports them: semicolons, cp1252, and unusual column names."""
    path = folder / "anfragen.csv"
    rows = draw(sample_sentences(["de"]), SMALL_ROWS, 4, seed=1)
    with path.open("w", encoding="cp1252", errors="replace", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(("Nr", "Anfrage", "Art"))
        writer.writerows(
            (number, text, label.removeprefix("de_")) for number, (text, label) in enumerate(rows, 1)
        )
    return DataSet("60-row CSV", path, "apache-2.0", len(rows))


def write_labels(path: Path, number: int, per_template: int) -> DataSet:
    """Write sentences of 77 labels, gzipped."""
    rows = draw(sample_sentences(LANGUAGES, per_template), number, LABELS, seed=2)
    with gzip.GzipFile(path, "wb", mtime=0) as raw:
        text = "".join(f"{json.dumps(text, ensure_ascii=False)},{label}\n" for text, label in rows)
        raw.write(f"text,label\n{text}".encode())
    return DataSet(f"{len(rows):,} rows, {LABELS} labels", path, "apache-2.0", len(rows))


def write_chats(folder: Path) -> DataSet:
    """Write requests and JSON answers as OpenAI's fine-tuning file: names, several turns, and weights."""
    from stages.common.sources.home_intents.collect import collect_home_intents

    path = folder / "openai.jsonl"
    rows = collect_home_intents("2026.10.27", "en", 2, 8, 7, None).rows
    chosen = random.Random(3).sample(rows, min(CHAT_ROWS, len(rows)))
    lines = []
    for number, row in enumerate(chosen):
        messages: list[dict[str, Any]] = [{"role": "system", "content": "Answer with one intent as JSON."}]
        if number % 5 == 0:
            messages += [
                {"role": "user", "content": "Hello", "name": "guest"},
                {"role": "assistant", "content": "Hello! What can I do?", "weight": 0},
            ]
        messages += [
            {"role": "user", "content": row.question, "name": "guest"},
            {"role": "assistant", "content": row.answer, "weight": 1},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return DataSet("OpenAI fine-tuning JSONL", path, "apache-2.0", len(lines))


def write_commands(folder: Path, clone: Path) -> DataSet:
    """Write descriptions and shell commands of the English pages as chats."""
    path = folder / "commands.jsonl"
    examples: dict[str, str] = {}
    for name, page in read_pages(clone, "pages"):
        for described, command in re.findall(r"^- (.+):\n\n`(.+)`$", page, re.MULTILINE):
            command = re.sub(r"\{\{(?:\[[^|\]]*\|)?([^}\]]*)\]?\}\}", r"\1", command)
            described = re.sub(r"\[(\w)\]", r"\1", described).replace("`", "")
            examples.setdefault(f"{described} ({name})", command)
    chosen = random.Random(4).sample(sorted(examples.items()), min(COMMAND_ROWS, len(examples)))
    lines = [
        json.dumps(
            {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]},
            ensure_ascii=False,
        )
        for q, a in chosen
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return DataSet("6,000 descriptions and commands", path, "cc-by-4.0", len(lines))


def write_alpaca(folder: Path, clone: Path) -> DataSet:
    """Write the Alpaca file of LLaMA-Factory unchanged."""
    path = folder / "alpaca.json"
    text = git(clone, "show", "HEAD:data/alpaca_en_demo.json").decode()
    path.write_text(text, encoding="utf-8")
    return DataSet("Alpaca JSON", path, "apache-2.0", len(json.loads(text)))


def read_pages(clone: Path, folder: str) -> Iterator[tuple[str, str]]:
    """Yield the name and the text of every Markdown page of a folder in the newest commit of a clone."""
    archive = git(clone, "archive", "--format=tar", "HEAD", folder)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        for member in sorted(files.getmembers(), key=lambda member: member.name):
            page = files.extractfile(member) if member.name.endswith(".md") else None
            if page:
                yield Path(member.name).stem, page.read().decode()


def git(clone: Path, *arguments: str) -> bytes:
    """Return what git prints in a clone, bare or not."""
    return subprocess.run(["git", "-C", str(clone), *arguments], check=True, capture_output=True).stdout
