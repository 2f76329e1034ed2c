"""The stages on texts that do not fit into memory, and are in a temporary file."""

import random
from pathlib import Path
from string import ascii_lowercase

import yaml

from stages.check_bias.__main__ import main as check_bias
from stages.common import spool
from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.curate.__main__ import main as curate
from stages.split.__main__ import main as split

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
    Path("params.yaml").write_text(yaml.safe_dump(values))
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
    made = {}
    for max_held in (10**9, 0):
        monkeypatch.setattr(spool, "MAX_HELD", max_held)
        (tmp_path / str(max_held)).mkdir()
        monkeypatch.chdir(tmp_path / str(max_held))
        write_project()
        assert isinstance(read_rows(Path("artifacts/collect/rows.parquet")), list) == bool(max_held)
        for stage in (curate, check_bias, split):
            stage()
        files = [path for path in sorted(Path().rglob("*")) if path.suffix in (".parquet", ".json", ".jsonl")]
        made[max_held] = {str(path): path.read_bytes() for path in files}
    assert made[0] == made[10**9]
    assert len(made[0]) > 8
