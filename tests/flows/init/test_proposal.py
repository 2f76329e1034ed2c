import pytest

from flows.init.estimate import RunEstimate
from flows.init.proposal import check_license, pick_languages
from flows.init.report import report_run
from stages.common.errors import InputError


@pytest.mark.parametrize(
    ("license", "written"),
    [
        ("CC-BY-4.0", "cc-by-4.0"),
        ("mit", "mit"),
        ("LicenseRef-Acme", "LicenseRef-Acme"),
        ("MIT OR GPL-3.0-only",) * 2,
    ],
)
def test_a_licence_is_written_in_one_spelling(license, written):
    assert check_license(license) == written


@pytest.mark.parametrize("license", ["", "cc by 4.0", "my own"])
def test_what_is_no_spdx_expression_is_refused_with_an_example(license):
    with pytest.raises(InputError, match=r"LicenseRef-Proprietary"):
        check_license(license)


def test_a_language_of_few_rows_is_not_one_of_the_model():
    assert pick_languages({"de": 90, "en": 8, "it": 2}) == ["de", "en"]
    assert pick_languages(None) == []


def test_a_long_run_is_shown_with_the_rows_of_a_short_one():
    def shown(minutes, gpus=1):
        return report_run(RunEstimate(81_234, 15_000, 3_000_000, "bfloat16", minutes, gpus))

    assert "about 30 minutes with split.max_train_rows: 16000" in shown(150.0)
    assert "max_train_rows" not in shown(59.0)
    assert "in bfloat16 on 4 GPUs, if they are 4 times as fast as one\n" in shown(59.0, 4)
    assert "GPU" not in shown(59.0)
