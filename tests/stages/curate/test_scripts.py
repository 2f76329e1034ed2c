"""Rows of every script go through curate and split as rows in English do."""

import json
import random
from pathlib import Path

import pytest
import yaml

from stages.common.messages import Message
from stages.common.records import make_row, read_rows, write_rows
from stages.curate.__main__ import main as curate
from stages.split.__main__ import main as split

ROOT = Path(__file__).parents[3]
# Words with spaces between them, what is between them in a sentence, and what ends it.
SCRIPTS = {
    "Hindi": ("मुझे बताओ कि आज मौसम कैसा है और कल बारिश होगी या क्\u200dष नहीं दिल्ली में कौन", " ", "।"),
    "Chinese": ("今 天 气 怎 么 样 请 告 诉 我 明 会 不 下 雨 北 京 到 上 海 的 火 车 几 点", "", "？"),
    "Persian": ("می\u200cخواهم بدانم که هوا امروز چطور است و فردا باران می\u200cبارد یا نه قطار", " ", "؟"),
    "Thai": ("วันนี้ อากาศ เป็น อย่างไร ช่วย บอก ฉัน พรุ่งนี้ ฝน จะ ตก ไหม รถไฟ ไป เชียงใหม่ กี่โมง", "", "\u200b"),
    "Korean": ("오늘 날씨가 어떤지 알려 주세요 내일 비가 오나요 서울에서 부산까지 기차는 몇 시에", " ", "?"),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_row_is_changed_or_lost_and_a_copy_in_another_spelling_is_found(tmp_path, monkeypatch, script):
    monkeypatch.chdir(tmp_path)
    params = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    params["task"] |= {"kind": "text", "label_key": None, "stratify_by": None}
    Path("params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    words, between, end = SCRIPTS[script]
    rng = random.Random(1)
    texts = [between.join(rng.sample(words.split(), 11)) + end for _ in range(120)]
    rows = [make_row([Message("user", text), Message("assistant", text)], "toy", "mit") for text in texts]
    copies = [
        make_row([Message("user", f"\u2060{text}\ufeff !"), Message("assistant", f"{n}")], "toy", "mit")
        for n, text in enumerate(texts)
    ]
    write_rows(Path("artifacts/collect/rows.parquet"), [*rows, *copies])
    curate()
    assert {r.id for r in read_rows(Path("artifacts/curate/rows.parquet"))} == {
        r.id for r in (*rows, *copies)
    }
    split()
    report = json.loads(Path("reports/split/metrics.json").read_text(encoding="utf-8"))
    sides = {
        side: read_rows(Path(f"artifacts/split/{side}.parquet")) for side in ("train", "validation", "test")
    }
    learned = {r.question.strip("\u2060\ufeff !") for r in sides["train"]}
    asked = {r.question.strip("\u2060\ufeff !") for side in ("validation", "test") for r in sides[side]}
    assert not learned & asked
    assert report["train_rows_removed_as_near_duplicates"] > 0
