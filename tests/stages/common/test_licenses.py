import pytest

from stages.common.licenses import to_spdx


@pytest.mark.parametrize(
    ("license", "spdx"),
    [
        ("cc-by-4.0", "CC-BY-4.0"),
        ("MIT or apache-2.0", "MIT OR Apache-2.0"),
        ("LicenseRef-Acme", "LicenseRef-Acme"),
        ("not a licence", None),
        ("", None),
    ],
)
def test_a_licence_is_an_spdx_expression_or_none(license, spdx):
    assert to_spdx(license) == spdx
