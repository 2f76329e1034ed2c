from collections import Counter

import pytest

from stages.common.chat.template import encode_example
from stages.common.errors import InputError
from stages.common.messages import Message
from stages.common.model.loading import load_tokenizer
from stages.common.records import make_row
from stages.finetune.batches import encode_rows, plan_batches
from tests.stages.finetune.project import rows
from tests.tiny import save_model


def test_every_epoch_takes_each_row_once_in_an_order_of_its_own():
    lengths = [10 + n % 13 for n in range(103)]
    plan = plan_batches(lengths, batch_size=8, epochs=2, seed=7)
    assert plan == plan_batches(lengths, 8, 2, 7)
    assert plan != plan_batches(lengths, 8, 2, 8)
    half = len(plan) // 2
    for epoch in (plan[:half], plan[half:]):
        assert Counter(row for batch in epoch for row in batch) == Counter(range(103))
    assert plan[:half] != plan[half:]
    spread = [max(lengths[r] for r in b) - min(lengths[r] for r in b) for b in plan]
    assert sum(spread) / len(spread) <= 2


def test_long_rows_are_dropped_or_named(tmp_path):
    tokenizer = load_tokenizer(save_model(tmp_path))
    toy = rows(3)
    length = max(len(encode_example(tokenizer, row.messages).input_ids) for row in toy)
    longer = make_row([Message("user", "x" * 200), Message("assistant", "y")], "toy", "cc0-1.0")
    examples, ids, long = encode_rows(tokenizer, [*toy, longer], length, "drop", "last")
    assert (len(examples), [misfit.row for misfit in long]) == (3, [longer])
    assert list(ids) == [row.id for row in toy]
    with pytest.raises(InputError, match=f"longer than {length} tokens[\\s\\S]*a longer context"):
        encode_rows(tokenizer, [*toy, longer], 2 * length + 200, "stop", "last", limit=length)
    with pytest.raises(InputError, match=r"lower finetune\.num_virtual_tokens") as error:
        encode_rows(tokenizer, toy, 2 * length, "stop", "last", limit=length - 3, virtual_tokens=3)
    assert f"take 3 of the base model's {length} positions" in error.value.fix
    with pytest.raises(InputError, match=r"all 3 rows[\s\S]*fix: lower finetune.num_virtual_tokens"):
        encode_rows(tokenizer, toy, 2 * length, "drop", "last", limit=5, virtual_tokens=3)
    with pytest.raises(InputError, match=f"1 of 4 rows .*\n.*{longer.id}.*\n.*finetune.max_length"):
        encode_rows(tokenizer, [*toy, longer], length, "stop", "last")
    with pytest.raises(InputError, match="all 3 rows"):
        encode_rows(tokenizer, toy, 5, "drop", "last")
