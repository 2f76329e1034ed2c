import pytest

from flows.init.proposal import check_license, pick_languages
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
