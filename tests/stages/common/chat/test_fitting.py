"""Which rows are trained on."""

from pathlib import Path

import pytest

from stages.common.chat.fitting import select_rows
from stages.common.errors import InputError
from stages.common.model.adapter import InitialAdapter
from tests.stages.finetune.project import rows


def test_each_start_has_another_share_of_the_old_rows_and_all_the_new(caplog):
    old, new = rows(400), rows(5, start=2000)

    def chosen(share, version):
        start = InitialAdapter(Path("start"), version, "base")
        return {row.id for row in select_rows([*old, *new], start, known, share, seed=7)}

    known = {row.id for row in old}
    fresh = {row.id for row in new}
    one, other = chosen(0.25, "v1"), chosen(0.25, "v2")
    assert one == chosen(0.25, "v1") != other
    assert fresh < one and fresh < other and 60 < len(one) < 145
    assert chosen(0.0, "v1") == fresh and len(chosen(1.0, "v1")) == 405
    assert len(select_rows(old, None, set(), 0.0, seed=7)) == 400
    assert not caplog.messages
    start = InitialAdapter(Path("start"), "v1", "base")
    assert len(select_rows(old, start, set(), 0.25, seed=7)) == 400
    assert "the adapter of v1 does not record the rows it was trained on" in caplog.text
    with pytest.raises(InputError, match="trained on all 400 training rows already") as error:
        select_rows(old, start, known, 0.0, seed=7)
    assert "finetune.replay_share" in error.value.fix
