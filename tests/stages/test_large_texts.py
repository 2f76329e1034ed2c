"""The stages on texts that do not fit into memory, and are in a temporary file."""

import random
from pathlib import Path
from string import ascii_lowercase

import yaml

from services.engines import offline
from stages.ask_base import main as ask_base
from stages.check_bias.__main__ import main as check_bias
from stages.common import spool
from stages.common.artifacts import write_json
from stages.common.chat.fitting import encode_fitting
from stages.common.messages import Message
from stages.common.model.generation import encode_questions
from stages.common.records import make_row, read_rows, write_rows
from stages.curate.__main__ import main as curate
from stages.finetune.batches import encode_rows
from stages.preflight.__main__ import main as preflight
from stages.split.__main__ import main as split
from stages.validate.__main__ import main as validate
from tests.tiny import make_tokenizer, save_model

ROOT = Path(__file__).parents[2]
ROWS, CHARS = 60, 500


def write_project():
    """Passages of about so many characters, some of them near duplicates, with line ends to change."""
    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["task"] |= {"kind": "text", "label_key": None, "stratify_by": None, "slices": []}
    values["curate"]["max_question_chars"] = 2 * CHARS
    values["check_bias"]["groups"] = {
        "person_gender": {"min_representation_ratio": None, "max_cramers_v": 0.9}
    }
    values["finetune"]["max_length"] = 4 * CHARS
    values["ask_base"]["max_new_tokens"] = 8
    Path("params.yaml").write_text(yaml.safe_dump(values))
    merges = (("a", "b"),)
    save_model(Path("artifacts/fetch_base"), merges=merges, max_position_embeddings=4 * CHARS)
    write_json(Path("reports/fetch_base/metrics.json"), {"license": "mit"})
    rng = random.Random(1)
    rows = []
    for number in range(ROWS):
        if number % 10 == 9:
            text = rows[-1].question + " again"
        else:
            lines = ("".join(rng.choices(ascii_lowercase, k=98)) for _ in range(CHARS // 100))
            text = "\r\n".join(lines)
        messages = [Message("user", text), Message("assistant", f"answer {number // 10 % 20}")]
        rows.append(make_row(messages, "toy", "mit", group=f"g{number // 2}"))
    write_rows(Path("artifacts/collect/rows.parquet"), rows)


def test_a_spool_and_a_list_give_the_same_files(tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "KV_CACHE_MIB", 4)
    made = {}
    for max_held in (10**9, 0):
        monkeypatch.setattr(spool, "MAX_HELD", max_held)
        (tmp_path / str(max_held)).mkdir()
        monkeypatch.chdir(tmp_path / str(max_held))
        write_project()
        assert isinstance(read_rows(Path("artifacts/collect/rows.parquet")), list) == bool(max_held)
        for stage in (curate, validate, check_bias, split, preflight, ask_base):
            stage()
        Path("reports/ask_base/metrics.json").unlink()  # it has seconds
        files = [path for path in sorted(Path().rglob("*")) if path.suffix in (".parquet", ".json", ".jsonl")]
        made[max_held] = {str(path): path.read_bytes() for path in files}
    assert made[0] == made[10**9]
    assert {"artifacts/ask_base/answers.parquet", "reports/preflight/metrics.json"} <= made[0].keys()


def test_token_ids_are_read_one_row_at_a_time_where_they_are_many(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    rows = [
        make_row([Message("user", f"{n} " + "x" * CHARS), Message("assistant", "yes")], "toy", "mit")
        for n in range(ROWS)
    ]
    held = list(encode_rows(tokenizer, rows, 4 * CHARS, "stop", "last")[0]), encode_questions(tokenizer, rows)
    monkeypatch.setattr(spool, "MAX_HELD", 10 * CHARS)
    stored = encode_rows(tokenizer, rows, 4 * CHARS, "stop", "last")[0], encode_questions(tokenizer, rows)
    assert stored[1].is_stored and encode_fitting(tokenizer, rows)[0].is_stored
    assert [list(items) for items in stored] == [list(items) for items in held]
    assert [example for _, example in encode_fitting(tokenizer, rows)[0]] == held[0]
    assert stored[0][-1] == held[0][-1] and stored[1][3].reference == held[1][3].reference
