"""The gate's criteria on made-up answers; and, slow, both versions on a private server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import yaml

from flows.common import processes
from flows.gate import private_server
from flows.gate.card import CARD, CARD_SECTIONS, find_card_problems
from flows.gate.evaluation import Evidence, PairedAnswers, keep_test_rows, read_new_test, read_old_test
from flows.gate.judge import judge, select_bias_tags
from flows.gate.verdict import find_changed_files, format_verdict, read_verdict, write_verdict
from services import parity
from services.versions.aliases import ALIASES, Aliases, Challenger, read_aliases, write_aliases
from stages.common.artifacts import hash_file, read_json, write_json, write_text
from stages.common.errors import InputError
from stages.common.messages import Message, ToolCall, format_calls
from stages.common.params.loading import load_params
from stages.common.records import make_row, write_rows
from stages.common.repository.dvc_lock import compute_dvc_hash
from stages.common.statistics.intervals import Difference
from stages.common.task.json_task import JsonTask
from stages.common.task.kinds import TASK_FILE
from stages.common.task.text_task import TextTask
from stages.common.task.tools_task import ToolsTask
from tests.services.serving import ROOT
from tests.tiny import save_model

SHIPPED = load_params(ROOT / "params.yaml")


# 300 resamples are enough for gains as clear as these.
SETTINGS = SHIPPED.flows.retrain.gate.model_copy(update={"resamples": 300})
OLD, NEW = f"m:{'a' * 12}", f"m:{'b' * 12}"
RIGHT = '{"intent":"on"}'


def row(question, answer=RIGHT, group=None, **tags):
    messages = [Message("user", question), Message("assistant", answer)]
    return make_row(messages, "test", "mit", group=group, tags={"intent": "on", **tags})


def rows(count, per_group=1, **tags):
    return tuple(row(f"question {n}", group=f"g{n // per_group}", **tags) for n in range(count))


def answers(count, right, wrong='{"intent":"off"}'):
    """Return as many answers of which the first are right."""
    return tuple(RIGHT if n < right else wrong for n in range(count))


def paired(count, champion, candidate, **more):
    return PairedAnswers(
        rows(count),
        candidate=answers(count, candidate, **more),
        champion=answers(count, champion, **more),
    )


def make_evidence(**changes):
    same = Difference(0.0, -0.01, 0.01, 1.0)
    verdict = parity.ParityReport("b" * 12, True, 200, 0.8, 0.8, same, 0.99, 0, ())
    given = Evidence(
        NEW,
        OLD,
        JsonTask("intent"),
        new=paired(120, 30, 90),
        old=paired(400, 340, 342),
        parity=verdict,
        card=(),
        evaluation={},
        excluded={},
        files={},
    )
    return replace(given, **changes)


def judged(**changes):
    """Return the verdict, and its criteria by name."""
    tags = select_bias_tags(SHIPPED.check_bias.groups, SHIPPED.task.slices)
    limit = SHIPPED.services.parity.max_exact_match_loss
    verdict = judge(make_evidence(**changes), SETTINGS, tags, limit, made_at=5.0)
    return verdict, {criterion.name: criterion for criterion in verdict.criteria}


def test_a_candidate_that_is_better_on_the_new_and_as_good_on_the_old_passes_with_figures():
    verdict, by_name = judged()
    assert verdict.passed and verdict.mode == "champion" and verdict.failures == ()
    assert set(by_name) == {"new_window", "old_test", "bias", "safety", "parity", "card"}
    new = by_name["new_window"]
    assert (new.value, new.threshold) == (pytest.approx(0.5), 0.0)
    assert 0.4 < new.low < 0.5 < new.high < 0.6
    assert "exact match on 120 rows of the new traffic: 25.0% -> 75.0%, +50.0 points" in new.summary


def test_a_gain_within_chance_does_not_pass():
    verdict, by_name = judged(new=paired(60, 30, 31))
    assert not verdict.passed and [failed.name for failed in verdict.failures] == ["new_window"]
    assert by_name["new_window"].value > 0.0 >= by_name["new_window"].low


def test_a_preference_is_judged_on_test_pairs_where_a_gain_is_asked_for():
    def measure(low, high):
        change = {"value": (low + high) / 2, "low": low, "high": high, "p_value": 0.01}
        sides = {"before": {"accuracy": {"value": 0.5}}, "tuned": {"accuracy": {"value": 0.7}}}
        return {"preferences": {"pairs": 80, **sides, "difference": {"accuracy": change}}}

    assert "preference" not in judged(evaluation=measure(-0.2, 0.1))[1]
    asked = SETTINGS.model_copy(update={"min_preference_gain": 0.0})
    few = {"preferences": {"pairs": 3, "skipped": "too few test pairs: 3"}}
    for evaluation, passed, part in (
        (measure(0.1, 0.3), True, "80 test pairs is the likelier one: 50.0% -> 70.0%, +20.0 points"),
        (measure(-0.01, 0.3), False, "the lower end is not above 0.0 points"),
        (few, False, "was not measured: too few test pairs: 3"),
        ({}, False, "was not measured: no test row has a rejected answer"),
    ):
        verdict = judge(make_evidence(evaluation=evaluation), asked, [], 0.1, made_at=5.0)
        found = next(one for one in verdict.criteria if one.name == "preference")
        assert (verdict.passed, found.passed) == (passed, passed) and part in found.summary


def test_too_few_new_rows_are_no_verdict():
    _, by_name = judged(new=paired(SETTINGS.min_new_rows - 1, 0, 49))
    assert not by_name["new_window"].passed and by_name["new_window"].value is None
    assert "49 held-out labelled rows" in by_name["new_window"].summary


@pytest.mark.parametrize(("lost", "passes"), [(0, True), (2, True), (3, False)])
def test_half_a_point_of_the_old_test_may_be_lost_and_no_more(lost, passes):
    _, by_name = judged(old=paired(400, 340, 340 - lost))
    assert by_name["old_test"].passed is passes
    assert by_name["old_test"].value == pytest.approx(-lost / 400)


def test_a_candidate_that_trained_on_the_champions_test_proves_nothing_by_it():
    _, by_name = judged(
        old=paired(100, 50, 100), excluded={"old: the candidate was trained on the group or question": 101}
    )
    assert not by_name["old_test"].passed
    assert "trained on 101 of the champion's 201 test rows" in by_name["old_test"].summary


def of_groups(champion, candidate, count=60):
    """Return answers to women's and men's questions, given how many are right of each."""
    both = [
        replace(one, tags={**one.tags, "person_gender": gender})
        for gender in ("female", "male")
        for one in rows(count)
    ]
    both = [replace(one, group=f"g{n}", id=f"{n}") for n, one in enumerate(both)]
    sides = [
        tuple(text for right in (side["female"], side["male"]) for text in answers(count, right))
        for side in (candidate, champion)
    ]
    return PairedAnswers(tuple(both), *sides)


@pytest.mark.parametrize(
    ("candidate", "passes"),
    [
        ({"female": 50, "male": 52}, True),
        ({"female": 25, "male": 58}, False),
        ({"female": 47, "male": 52}, True),
    ],
)
def test_a_gap_between_groups_may_not_grow_beyond_chance(candidate, passes):
    _, by_name = judged(old=of_groups({"female": 50, "male": 50}, candidate))
    found = by_name["bias_person_gender"]
    assert found.passed is passes
    assert found.value == pytest.approx((candidate["male"] - candidate["female"]) / 60)
    assert "female 60, male 60 rows" in found.summary


def test_groups_with_few_rows_are_reported_as_not_tested():
    _, by_name = judged(old=of_groups({"female": 5, "male": 5}, {"female": 0, "male": 5}, count=5))
    assert by_name["bias"].passed and "not tested" in by_name["bias"].summary


@pytest.mark.parametrize("bad", ["I am not JSON", '{"intent":"on","note":"AKIAIOSFODNN7ABCDEFG"}'])
def test_answers_that_should_not_go_out_are_counted(bad):
    old = paired(400, 340, 340, wrong='{"intent":"off"}')
    worse = replace(old, candidate=answers(400, 340, wrong=bad))
    _, by_name = judged(old=worse)
    assert not by_name["safety"].passed
    assert by_name["safety"].value == pytest.approx(60 / 520)
    assert judged(old=old)[1]["safety"].passed


def test_a_candidate_that_is_served_otherwise_than_trained_is_refused():
    found = make_evidence().parity
    _, by_name = judged(parity=replace(found, agrees=False, reasons=("another chat template",)))
    assert not by_name["parity"].passed and by_name["parity"].summary == "another chat template"


def test_without_a_champion_the_first_model_must_beat_its_base():
    def first(low):
        figures = {"base": 0.1, "tuned": 0.8}
        evaluation = {"primary": "exact_match", "rows": 300} | {
            side: {"exact_match": {"value": value}} for side, value in figures.items()
        }
        change = {"exact_match": {"value": 0.7, "low": low, "high": 0.8}}
        return judged(champion=None, new=None, old=None, evaluation=evaluation | {"difference": change})

    verdict, by_name = first(0.6)
    assert verdict.passed and verdict.mode == "first"
    assert set(by_name) == {"better_than_base", "parity", "card"}
    assert not first(-0.1)[0].passed


def test_text_tasks_are_judged_by_chrf():
    text = PairedAnswers(
        tuple(row(f"q{n}", "the cat sat on the mat", group=f"g{n}") for n in range(60)),
        candidate=("the cat sat on a mat",) * 60,
        champion=("a dog",) * 60,
    )
    new = judged(task=TextTask(), new=text, old=text)[1]["new_window"]
    assert new.summary.startswith("chrf on 60 rows") and 0.5 < new.value < 1.0


def test_calls_are_judged_by_structure_and_a_candidate_that_no_longer_calls_is_refused():
    def call(arguments):
        return format_calls("", [ToolCall("light_set", arguments)])

    right, reordered = (call(text) for text in ('{"area":"hall","level":3}', '{"level": 3, "area": "hall"}'))
    sides = [(reordered, call('{"area":"hall"}')), ("The light is on.", reordered)]
    better, silent = (
        PairedAnswers(
            tuple(row(f"q{n}", right, group=f"g{n}") for n in range(60)),
            candidate=(candidate,) * 60,
            champion=(champion,) * 60,
        )
        for candidate, champion in sides
    )
    verdict, criteria = judged(task=ToolsTask(), new=better, old=better)
    assert criteria["new_window"].summary.startswith("call match on 60 rows")
    assert criteria["new_window"].passed and criteria["new_window"].value == pytest.approx(1.0)
    verdict, criteria = judged(task=ToolsTask(), new=better, old=silent)
    assert not criteria["old_test"].passed and not verdict.passed


def test_a_verdict_survives_writing_and_reading_and_others_are_told_apart(tmp_path):
    verdict, _ = judged(card=("the card is missing",), files={"x": "y"})
    path = write_verdict(tmp_path, verdict)
    assert path == tmp_path / f"reports/gate/{'b' * 12}.json"
    assert read_verdict(tmp_path, NEW) == verdict
    assert find_changed_files(tmp_path, verdict) == ["x"]
    assert read_verdict(tmp_path, OLD) is None
    with pytest.raises(InputError, match=f"is the verdict on {NEW}, not on other:b"):
        read_verdict(tmp_path, f"other:{'b' * 12}")
    assert "FAILED  card" in format_verdict(verdict)
    write_json(path, {"tag": NEW})
    with pytest.raises(InputError, match="is not a valid verdict"):
        read_verdict(tmp_path, NEW)


@pytest.fixture
def checkout(tmp_path):
    """Return a checkout whose pipeline has made version b, after a champion a."""
    write_rows(
        tmp_path / "artifacts/split/train.parquet", [row("Turn it ON", group="t1"), row("dim", group="t2")]
    )
    write_rows(tmp_path / "artifacts/split/test.parquet", [row("new test", group="t9")])
    write_json(tmp_path / "artifacts/export/serving.json", {"name": "m", "version": "b" * 12})
    write_json(tmp_path / "reports/evaluate/metrics.json", {"answer_limit_tokens": 7})
    write_json(tmp_path / TASK_FILE, JsonTask("intent").describe())
    return tmp_path


def test_the_champion_is_asked_its_own_test_without_what_the_candidate_learned(checkout):
    former = [row("turn  it on?", group="x"), row("other", group="t2"), row("kept", group="y")]
    write_rows(checkout / f".perennial/tests/{'a' * 12}.parquet", former)
    found = read_old_test(checkout, checkout, OLD, JsonTask("intent"), SETTINGS)
    assert [one.question for one in found.rows] == ["kept"]
    assert found.max_tokens == 7
    assert found.excluded == {"the candidate was trained on the group or question": 2}


def test_a_test_split_is_kept_before_the_pipeline_writes_another(checkout):
    assert keep_test_rows(checkout) == "b" * 12
    write_rows(checkout / "artifacts/split/test.parquet", [row("later test", group="t9")])
    assert keep_test_rows(checkout) == "b" * 12
    kept, current = (
        read_old_test(checkout, checkout, tag, JsonTask("intent"), SETTINGS).rows for tag in (NEW, OLD)
    )
    assert [one.question for one in kept] == ["new test"]
    assert [one.question for one in current] == ["later test"], "none was kept"


def test_the_new_test_is_what_was_held_out_and_never_learned(checkout):
    held = [row("turn it on"), row("lights off"), row("no json", answer="what?"), row("lights off")]
    lines = "".join(json.dumps({**asdict(one), "tags": dict(one.tags)}) + "\n" for one in held)
    write_text(checkout / ".perennial/holdout/rows.jsonl", lines)
    found = read_new_test(checkout, checkout, JsonTask("intent"), SETTINGS, max_tokens=256)
    assert [one.question for one in found.rows] == ["lights off"]
    assert found.max_tokens == 256
    assert found.excluded == {
        "duplicate": 1,
        "the label is not an answer of the task": 1,
        "the candidate was trained on the question": 1,
    }


def test_a_card_must_be_there_whole_and_this_adapters(checkout):
    assert find_card_problems(checkout) == ["reports/model_card/README.md does not exist"]
    adapter = checkout / "artifacts/finetune/adapter_model.safetensors"
    write_text(adapter, "weights")
    sha = hash_file(adapter)
    serving = {"name": "m", "version": "b" * 12, "adapter_sha256": sha}
    write_json(checkout / "artifacts/export/serving.json", serving)
    parts = "".join(f"\n## {name}\n\nsomething\n" for name in CARD_SECTIONS[:-1])
    lineage = f"\n## Lineage\n\nadapter {compute_dvc_hash(adapter.parent)}\n"
    write_text(checkout / CARD, f"# Card\n{parts}{lineage}")
    assert find_card_problems(checkout) == []
    write_text(checkout / CARD, f"# Card\n{parts.replace('something', '', 1)}")
    assert [problem.split(" of ")[0].split(" README")[0] for problem in find_card_problems(checkout)] == [
        "reports/model_card/README.md does not contain the hash",
        "reports/model_card/README.md has no section Lineage",
        "section Use",
    ]
    write_text(adapter, "others")
    assert any("was not made from the adapter" in problem for problem in find_card_problems(checkout))


def test_the_private_server_has_files_of_its_own_and_no_user_limits(tmp_path):
    access = SHIPPED.services.access.model_copy(update={"keys": "always", "requests_per_minute": 1})
    enforced = {"secrets": "enforce", "control_tokens": "enforce"}
    limits = SHIPPED.services.guard.model_copy(update={**enforced, "toxicity": "off"})
    finetune = SHIPPED.finetune.model_copy(update={"learning_rate": 1e-5})  # which YAML would read as a word
    services = SHIPPED.services.model_copy(update={"access": access, "guard": limits})
    params = SHIPPED.model_copy(update={"services": services, "finetune": finetune})
    with private_server.own_folder(tmp_path, params, NEW, OLD, "id") as folder:
        found = load_params(folder / "params.yaml")
        assert read_aliases(folder / ALIASES) == Aliases(NEW, Challenger(OLD, 0.0, "canary"))
    assert not folder.exists() and not (tmp_path / ALIASES).exists()
    assert found.services.events.url == f"sqlite:///{folder}/events.db"
    assert (found.services.access.keys, found.services.access.requests_per_minute) == ("auto", None)
    assert (found.services.guard.secrets, found.services.guard.toxicity) == ("record", "off")
    assert found.services.guard.control_tokens == "record", "a test row with <|im_end|> is answered"
    assert found.finetune.learning_rate == 1e-5


def test_the_folder_of_a_private_server_is_its_owners_as_long_as_it_lives(tmp_path):
    with private_server.own_folder(tmp_path, SHIPPED, NEW, OLD, "id") as folder:
        assert private_server.end_orphans(tmp_path) == 0 and folder.exists()
        left = shutil.copytree(folder, folder.with_name(f"{folder.name}-killed"))  # which no one holds
        assert private_server.end_orphans(tmp_path) == 1
        assert folder.exists() and not left.exists()


def test_the_private_server_runs_without_vllm_which_has_an_environment_of_its_own(tmp_path):
    engine = SHIPPED.services.engine.model_copy(update={"kind": "vllm", "gpus": 1})
    services = SHIPPED.services.model_copy(update={"engine": engine})
    params = SHIPPED.model_copy(update={"services": services})
    with private_server.own_folder(tmp_path, params, NEW, OLD, "id") as folder:
        found = load_params(folder / "params.yaml").services.engine
    assert (found.kind, found.gpus) == ("auto", 1)


LIMIT = 6  # tokens of an answer


def make_version(root, version, seed):
    """Write what the pipeline leaves of a tiny model with an adapter of its own."""
    import torch
    from peft import LoraConfig, get_peft_model

    from stages.common.model.loading import load_base

    base, adapter, export = (root / "artifacts" / name for name in ("fetch_base", "finetune", "export"))
    if not base.exists():
        save_model(base, tie_word_embeddings=False, initializer_range=0.5)
    model = load_base(base, torch.float32, torch.device("cpu"))
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, lora_alpha=64, target_modules="all-linear", init_lora_weights=False)
    shutil.rmtree(adapter, ignore_errors=True)
    get_peft_model(model, lora).save_pretrained(adapter)
    shutil.rmtree(export, ignore_errors=True)
    shutil.copytree(base, export, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = adapter / "adapter_model.safetensors"
    about = {
        "name": "tiny",
        "version": version,
        "base_model": "tiny",
        "system_prompt": None,
        "task": {"kind": "text", "label_key": None, "labels": None},
        "answer_schema": None,
        "context_tokens": 512,
        "adapter_sha256": hash_file(weights),
    }
    write_json(export / "serving.json", about)


def answers_of(root, rows, limit):
    """Return what the pipeline's model answers."""
    import torch

    from stages.common.model.generation import answer_questions, encode_questions
    from stages.common.model.loading import load_tokenizer, load_tuned

    base, adapter = root / "artifacts/fetch_base", root / "artifacts/finetune"
    model, tokenizer = load_tuned(base, adapter, torch.float32, torch.device("cpu")), load_tokenizer(base)
    return [
        answer.text
        for answer in answer_questions(model, tokenizer, encode_questions(tokenizer, rows), 8, limit)
    ]


@pytest.fixture
def project(tmp_path):
    """Return a checkout with a tiny champion and a candidate that knows the new rows, and its environment."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = yaml.safe_load((ROOT / "params.yaml").read_text())
    values["task"] |= {"kind": "text", "label_key": None, "stratify_by": None}
    values["services"]["engine"]["kind"] = "transformers"
    values["services"]["answers"]["default_max_tokens"] = LIMIT
    values["model_card"]["name"] = "tiny"
    values["flows"]["retrain"]["gate"] |= {"min_new_rows": 20, "max_old_loss": 0.5, "resamples": 200}
    write_text(tmp_path / "params.yaml", yaml.safe_dump(values))
    environment = {**os.environ, "BENTOML_HOME": str(tmp_path / "bentoml"), "PYTHONPATH": str(ROOT)}
    make_version(tmp_path, "a" * 12, seed=1)
    add = [sys.executable, "-m", "services.versions", "add"]
    subprocess.run(add, cwd=tmp_path, env=environment, check=True, capture_output=True)
    write_aliases(tmp_path / ALIASES, Aliases(f"tiny:{'a' * 12}"))

    make_version(tmp_path, "b" * 12, seed=2)
    test = [row(f"old question {n}", "something else", group=f"o{n}") for n in range(24)]
    write_rows(tmp_path / "artifacts/split/test.parquet", test)
    write_rows(tmp_path / "artifacts/split/train.parquet", [row("learned", group="t")])
    asked = [row(f"new {n}", "x") for n in range(30)]
    known = zip(asked, answers_of(tmp_path, asked, LIMIT), strict=True)
    held = [row(one.question, text, group=f"n{one.id}") for one, text in known if text.strip()]
    lines = "".join(json.dumps({**asdict(one), "tags": dict(one.tags)}) + "\n" for one in held)
    write_text(tmp_path / ".perennial/holdout/rows.jsonl", lines)
    table = pa.table({"id": [one.id for one in test], "tuned": answers_of(tmp_path, test, LIMIT)})
    (tmp_path / "artifacts/evaluate").mkdir()
    pq.write_table(table, tmp_path / "artifacts/evaluate/predictions.parquet")
    write_json(tmp_path / "reports/evaluate/metrics.json", {"answer_limit_tokens": LIMIT})
    write_json(tmp_path / TASK_FILE, TextTask().describe())
    parts = "".join(f"\n## {name}\n\nsomething\n" for name in CARD_SECTIONS)
    write_text(tmp_path / CARD, f"# Card\n{parts}{compute_dvc_hash(tmp_path / 'artifacts/finetune')}\n")
    return tmp_path, environment


@pytest.mark.slow
def test_candidate_and_champion_answer_on_a_private_server(project):
    root, environment = project
    before = (root / ALIASES).read_bytes()
    command = [sys.executable, "-m", "flows.gate", f"tiny:{'b' * 12}"]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    verdict = read_verdict(root, f"tiny:{'b' * 12}")
    by_name = {criterion.name: criterion for criterion in verdict.criteria}
    assert verdict.passed and verdict.champion == f"tiny:{'a' * 12}"
    assert by_name["new_window"].low > 0.0, by_name["new_window"].summary
    assert find_changed_files(root, verdict) == [] and len(verdict.files) == 3
    assert read_json(root / f"reports/parity/{'b' * 12}.json")["agrees"]
    kept = read_json(root / f".perennial/gate/{'b' * 12}/answers.json")
    assert len(kept["old"]) == len(kept["parity"]) == 24
    assert any(pair["candidate"] != pair["champion"] for pair in kept["new"].values())
    assert (root / ALIASES).read_bytes() == before
    assert not (root / ".perennial/events.db").exists(), "the gate's questions are no traffic"
    assert list((root / ".perennial").glob("gate-service-*")) == []

    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and "the answers of both models are read from" in again.stderr
    assert read_verdict(root, f"tiny:{'b' * 12}").criteria == verdict.criteria


KILLED = """
import time
from pathlib import Path
from flows.gate import private_server
from stages.common.params.loading import load_params
with private_server.serve(Path.cwd(), load_params(), "tiny:{a}", None) as server:
    print(server.pid, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_gate_leaves_no_server_running(project):
    root, environment = project
    script = KILLED.format(a="a" * 12)
    with subprocess.Popen(
        [sys.executable, "-c", script], cwd=root, env=environment, stdout=subprocess.PIPE, text=True
    ) as owner:
        owner.stdout.readline()  # it is ready
        (folder,) = (root / ".perennial").glob("gate-service-*")
        run_id = read_json(folder / "owner.json")["run_id"]
        assert len(processes.find_orphans(run_id)) >= 2, "BentoML's parent and its worker"
        owner.send_signal(signal.SIGKILL)
    until = time.monotonic() + 300
    while processes.find_orphans(run_id) and time.monotonic() < until:
        time.sleep(0.2)
    assert processes.find_orphans(run_id) == []
    assert private_server.end_orphans(root) == 1
    assert list((root / ".perennial").glob("gate-service-*")) == []
