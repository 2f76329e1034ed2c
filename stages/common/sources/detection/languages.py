"""The language of a request, offline: py3langid's model with the guesses taken out."""

from __future__ import annotations

from functools import cache, lru_cache
from typing import Any

from stages.common.errors import InputError

# Those of most texts on the web. The model knows 142, and takes one short English request in thirty for
# Pidgin, Latin or Frisian. zxx: no language, as code or numbers.
LANGUAGES = (
    *("am", "ar", "az", "be", "bg", "bn", "ca", "cs", "da", "de", "el", "en", "es", "et", "fa", "fi"),
    *("fr", "gu", "he", "hi", "hr", "hu", "hy", "id", "is", "it", "ja", "ka", "kk", "km", "kn", "ko"),
    *("lo", "lt", "lv", "mk", "ml", "mn", "mr", "my", "ne", "nl", "no", "pa", "pl", "pt", "ro", "ru"),
    *("si", "sk", "sl", "sq", "sr", "sv", "sw", "ta", "te", "th", "tr", "uk", "ur", "uz", "vi", "zh", "zxx"),
)
# Bytes of letters in UTF-8: 12 Latin ones, 6 Cyrillic, 4 where a letter is a syllable or a word.
# Of English requests with 8 to 12 letters the model knew 64 %, with 20 to 30 98 %.
MIN_BYTES = 12
MAX_CHARS = 300  # read of a text; more changes nothing
SHORT = "short"
NO_LANGUAGE = "none"


def detect_language(text: str) -> str:
    """Return the ISO 639 code of a text's language; `SHORT` where it would be a guess, or `NO_LANGUAGE`.

    Raises:
        InputError: py3langid is not installed.
    """
    text = text[:MAX_CHARS]
    letters = "".join(filter(str.isalpha, text))
    if len(letters.encode("utf-8", "surrogatepass")) < MIN_BYTES:
        return SHORT
    return _classified(text)


@lru_cache(maxsize=20_000)  # people repeat each other
def _classified(text: str) -> str:
    code = str(_identifier().classify(text)[0])
    return NO_LANGUAGE if code == "zxx" else code


@cache
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError:
        raise InputError(
            "the package py3langid, which tells the language of a request, is not installed",
            "pip install '.[monitor]'",
        ) from None
    identifier = LanguageIdentifier.from_model_file(MODEL_FILE)
    identifier.set_languages(LANGUAGES)
    return identifier
