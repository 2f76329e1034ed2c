"""The example that rounds weights for a GPU; LLM Compressor itself has an environment of its own."""

import pytest

from docs.examples import gptq
from stages.common.errors import InputError
from stages.common.model.adapter import HEAD
from tests.stages.finetune.project import make_project


@pytest.mark.parametrize(("widths", "group"), [([4096, 14336], 128), ([576, 1536], 64), ([4096, 32], 32)])
def test_the_largest_group_divides_the_rows_of_every_matrix(widths, group):
    assert gptq.choose_group(widths) == group


def test_rows_that_no_group_divides_are_named():
    with pytest.raises(InputError, match="rows of 48 weights are no multiple of 32"):
        gptq.choose_group([64, 48])


def test_what_has_no_merged_weights_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.chdir(make_project(tmp_path))
    with pytest.raises(InputError, match="artifacts/finetune contains no adapter"):
        gptq.main(["small"])
    monkeypatch.setattr(gptq, "read_settings", lambda adapter: {"method": HEAD})
    with pytest.raises(InputError, match=r"finetune\.method head has no weights that could be merged"):
        gptq.main(["small"])
    assert not (tmp_path / "small").exists()
