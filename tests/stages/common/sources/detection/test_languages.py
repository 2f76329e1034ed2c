import sys

import pytest

from stages.common.errors import InputError
from stages.common.sources.detection import languages
from stages.common.sources.detection.languages import detect_language


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("turn on the light in the kitchen", "en"),
        ("schalte bitte das Licht in der Küche ein", "de"),
        ("allume la lumière dans la cuisine", "fr"),
        ("включи, пожалуйста, свет на втором этаже", "ru"),
        ("打开厨房的灯", "zh"),
        ("キッチンの電気をつけて", "ja"),
    ],
)
def test_the_language_of_a_request_is_told(text, code):
    assert detect_language(text) == code


@pytest.mark.parametrize("text", ["", "lights on", "21:30", "12345 67890 12345", "свет", "\ud800"])
def test_a_text_too_short_to_tell_is_short(text):
    assert detect_language(text) == "short"


def test_a_long_text_is_told_by_its_beginning():
    assert detect_language("turn on the light in the kitchen " * 10 + "mach das Licht aus " * 1000) == "en"


def test_the_missing_package_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    monkeypatch.setattr(
        languages, "_identifier", languages._identifier.__wrapped__
    )  # not the one loaded above
    with pytest.raises(InputError, match="py3langid") as error:
        detect_language("a text that was not classified before")
    assert "pip install '.[monitor]'" in error.value.fix
