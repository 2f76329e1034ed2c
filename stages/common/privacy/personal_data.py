"""Find personal data in a text: `curate` rejects rows with it, the event store redacts it.

Each finder yields the spans of one kind, from left to right, and takes time linear in the text. A finder goes
by form alone, which is what is redacted; `holds` excludes what has the form and is no person's: reserved
domains, numbers for fiction, addresses of machines.
"""

from __future__ import annotations

import ipaddress
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from stages.common.privacy.secrets import Span, find_secrets

# A run of characters that may precede an @, with the rest of the address if there is one. The run matches
# with and without an @: starting again within it would take quadratic time on "a.a.a.a".
AT = r"(?:@|%40|&#64;|&commat;|\\u0040| ?[\[(](?:at|@)[\])] ?)"
DOT = r"(?:\.| ?[\[(](?:dot|\.)[\])] ?)"
EMAIL = re.compile(
    rf"([\w.+-]++)(?:{AT}[\w-]+(?:{DOT}[\w-]+)*{DOT}(?:xn--[\w-]+|[^\W\d_]{{2,}})\b)?", re.IGNORECASE
)
DIGIT = re.compile(r"\d")
MAY_BE_EMAIL = re.compile(r"@|%40|&#64;|&commat;|\\u0040|[\[(]at[\])]", re.IGNORECASE)
RESERVED_DOMAIN = re.compile(r"(?:^|\.)(?:example\.(?:com|org|net|edu)|test|example|invalid|localhost)$")
# Names of files and packages have an @, too: icon@2x.png, react@18.2.0.tgz.
FILE = re.compile(
    r"\.(?:png|jpe?g|gif|svg|webp|ico|bmp|tgz|gz|whl|css|jsx?|tsx|json|ya?ml|html?|xml|txt|pdf)$"
)
# Names before the @ of machines, and of documentation; the last ones only at a domain of documentation.
MACHINE = re.compile(r"git|hg|svn|root|ubuntu|ec2-user|no-?_?reply|do-?not-?reply|mailer-daemon|nobody")
DOCUMENTED = re.compile(r"j(?:ohn|ane)[._]?doe|(?:max|erika)\.mustermann")
ANYONE = re.compile(
    r"user(?:\.?name)?|you|your[._-]?name|name|e?mail|your[._-]email|me|someone|foo|bar|test|info|support|contact"
    r"|first(?:name)?\.last(?:name)?|vorname\.nachname"
)
ANY_DOMAIN = re.compile(
    r"^(?:your-?(?:domain|company|site|mail|email|org)|my-?(?:domain|company|site)|domain|company|host"
    r"|provider|website|foo|bar|acme|test|email|mail|somewhere)\.(?:com|org|net|io|de|fr|co|tld)$"
)

# Digits in groups, with up to two of " ().-/" between them.
INTERNATIONAL = re.compile(r"(?<![\w+])(\+|(?<!\d[ .-])00 ?(?=[1-9]))\d(?:[ ().\-/]{0,3}\d){6,14}(?!\w)")
NORTH_AMERICAN = re.compile(
    r"(?<![\w.+-])(?<!\d )(?:1[ .-])?(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}"
    r"(?: ?(?:x|ext\.?) ?\d{1,5})?(?![\w-]| \d)"
)
TRUNK = re.compile(
    r"(?<![\w.,+-])(?<!\d[ :/])\(?0[1-9]\d{0,4}\)?(?:(?: [/-] |[ ./-])?\d{2,8}){1,5}(?![\w-]|[ .]\d)"
)
PAIRS = re.compile(r"(?<![\w.,+-])(?<!\d[ :/])0[1-9](?:[ .-]\d{2}){4}(?![\w-]|[ .-]\d\d(?!\w))")
SPANISH = re.compile(r"(?<![\w.,+-])(?<!\d )[679]\d{2}(?: \d{2}){3}(?![\w-]| \d)")
AFTER_A_WORD = re.compile(
    r"\b(?:tele(?:phone?|fono|fon|foon)|tél(?:éphone)?|teléfono|tel|phone|mobile|móvil|mobil|cell(?:ular)?"
    r"|handy|fax|whatsapp|sms|portable|call(?: me)?(?: at| on)?|text me at|ring|dial|rufnummer"
    r"|telefonnummer|电话|手机|電話)"
    r"(?: (?:number|nummer|no\.?|nr\.?))?(?: (?:is|ist|est|es|at|on|unter|au))?[\"' :.#=]{0,5}"
    r"(\(?\d(?:[ ().\-/]{0,2}\d){6,12})(?![\w-])",
    re.IGNORECASE,
)
DATE = re.compile(r"\d\d?([ ./-])\d\d?\1(?:19|20)\d\d|\d\d?[./-]\d\d?[./-]\d\d[ ,]|(?:19|20)\d\d[./-]")
FICTION = re.compile(r"1?(?:[2-9]\d{2})?555\d{4}$|1?555\d{7}$")
TOLL_FREE = re.compile(r"1?8(?:00|33|44|55|66|77|88)[2-9]\d{6}$")
# Country codes of ITU-T E.164.
COUNTRY_CODE = re.compile(
    r"(?:1|7|20|27|3[0-469]|4[013-9]|5[1-8]|6[0-6]|8[1246]|9[0-58]|2[1-69]\d|3[578]\d|42\d|50\d|59\d|6[789]\d"
    r"|80[08]|85\d|87\d|88\d|9[679]\d)"
)

IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Za-z]{2}\d{2}(?:[ .-]{0,2}[A-Za-z0-9]){11,30}", re.ASCII)
# Characters of an IBAN by country, of the registry of ISO 13616.
IBAN_LENGTHS = {
    country: length
    for length, countries in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC",
        32: "LC", 33: "RU",
    }.items()
    for country in countries.split()
}  # fmt: skip

CARD_START = re.compile(r"(?<![^\W_])(?<!\d[.,-])(?<![.,])[2-6]\d{0,18}(?!\d)")
CARD_GROUP = re.compile(r"[ .-]{1,2}(\d{1,19})(?!\d)")
IN_A_LIST = re.compile(r"\d[ -]{1,2}$")
# Lengths of numbers by their first digits, as the networks issue them.
CARD_LENGTHS = (
    (re.compile(r"4"), (16, 18, 19)),
    (re.compile(r"5[1-5]|2(?:2[2-9][1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)"), (16,)),
    (re.compile(r"3[47]"), (15,)),
    (re.compile(r"3(?:0[0-59]|[689])"), (14, 16)),
    (re.compile(r"35(?:2[89]|[3-8]\d)"), (16, 17, 18, 19)),
    (re.compile(r"220[0-4]"), (16, 17, 18, 19)),
    (re.compile(r"6"), (16, 17, 18, 19)),
    (re.compile(r"5(?:0|[6-9])"), (13, 15, 16, 18, 19)),
)

IPV4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w|\.\d)")
# Before four numbers that are no address.
NUMBERED = re.compile(
    r"(?:version|ver|release|build|section|chapter|clause|paragraph|firmware|§|==)[ .:=]{0,2}$", re.I
)
NETWORK = re.compile(r"/\d")
SSN = re.compile(r"(?<![\w-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
NAMED_SSN = re.compile(
    r"\b(?:ssn|social security(?: number| no\.?)?)(?: is)?[\"' :#=]{0,5}"
    r"((?!000|666|9\d\d)\d{3}[ -]?(?!00)\d{2}[ -]?(?!0000)\d{4})(?![\w-])",
    re.I,
)
VOID_SSNS = ("078-05-1120", "219-09-9999")  # printed on specimen cards, and withdrawn


def find_emails(text: str) -> Iterator[Span]:
    """Yield the spans of e-mail addresses, also with an escaped or spelled-out @."""
    if not MAY_BE_EMAIL.search(text):
        return
    for match in EMAIL.finditer(text):
        run = match.group(1)
        local = run.lstrip(".+-")  # an address begins with a letter or a digit
        if local and match.end() > match.end(1):
            yield match.start() + len(run) - len(local), match.end()


def find_phones(text: str) -> Iterator[Span]:
    """Yield the spans of phone numbers in a common notation.

    With a country code, in North American groups, with a leading 0, or behind a word for it; another bare run
    of digits may be anything.
    """
    if not DIGIT.search(text):
        return
    found = [match.span() for match in INTERNATIONAL.finditer(text) if _is_international(match)]
    found += (match.span() for pattern in (NORTH_AMERICAN, SPANISH) for match in pattern.finditer(text))
    found += (match.span() for match in PAIRS.finditer(text) if not _counts_on(match.group()))
    found += (match.span() for match in TRUNK.finditer(text) if _is_national(match.group()))
    found += (match.span(1) for match in AFTER_A_WORD.finditer(text) if not DATE.match(match.group(1)))
    yield from _outside_ibans(text, sorted(found))


def find_ibans(text: str) -> Iterator[Span]:
    """Yield the spans of IBANs of their country's length, with valid check digits (ISO 13616, mod 97).

    What follows, such as a BIC or a currency, is no part of it.
    """
    for match in IBAN.finditer(text) if DIGIT.search(text) else ():
        length = IBAN_LENGTHS.get(match.group()[:2].upper(), 0)
        places = [place for place in range(*match.span()) if text[place].isalnum()][:length]
        if not length or len(places) < length:
            continue
        number = "".join(text[place] for place in places)
        end = places[-1] + 1
        digits = "".join(str(int(c, 36)) for c in number[4:] + number[:4])
        if int(digits) % 97 == 1 and not text[end : end + 1].isdigit():
            yield match.start(), end


def find_credit_cards(text: str) -> Iterator[Span]:
    """Yield the spans of payment card numbers of a network's length, with a valid check digit (Luhn).

    What follows in a group of its own, such as check digits or a date, is no part of it.
    """
    found, done = [], 0
    for match in CARD_START.finditer(text):
        end = _find_card_end(text, match) if match.start() >= done else None
        if end is not None:
            found.append((match.start(), end))
            done = end
    yield from _outside_ibans(text, found)


def find_ipv4_addresses(text: str) -> Iterator[Span]:
    """Yield the spans of public IPv4 addresses; private ranges identify no one."""
    for match in IPV4.finditer(text):
        try:
            public = ipaddress.IPv4Address(match.group()).is_global
        except ValueError:
            continue
        if public:
            yield match.span()


def find_ssns(text: str) -> Iterator[Span]:
    """Yield the spans of US social security numbers of the ranges in use."""
    if not DIGIT.search(text):
        return
    found = [match.span() for match in SSN.finditer(text)]
    found += (match.span(1) for match in NAMED_SSN.finditer(text))
    yield from sorted(set(found))


PERSONAL_DATA: dict[str, Callable[[str], Iterator[Span]]] = {
    "email": find_emails,
    "phone": find_phones,
    "iban": find_ibans,
    "credit_card": find_credit_cards,
    "ipv4": find_ipv4_addresses,
    "ssn": find_ssns,
}
# What every kind has at least: an @ or another way to write it, a digit, or a long run of letters.
MAY_HOLD = re.compile(r"[@\d&()\[]")
LONG_RUN = re.compile(r"[A-Za-z_-]{16}")
RECOGNISERS = {**PERSONAL_DATA, "secret": find_secrets}


def find_spans(text: str, kinds: Sequence[str]) -> list[tuple[int, int, str]]:
    """Return start, end and kind of all that has the form of one of `kinds`, keys of `RECOGNISERS`.

    The text is read as a person sees it: invisible characters are skipped, and blanks, dashes and digits of
    other widths are the plain ones. The spans are those of the text as it is.
    """
    if not _may_hold(text):
        return []
    plain, places = _fold(text)
    found = [(start, end, kind) for kind in kinds for start, end in RECOGNISERS[kind](plain)]
    if places is not None:
        found = [(places[start], places[end - 1] + 1, kind) for start, end, kind in found]
    return found


def holds(kind: str, text: str) -> bool:
    """Return whether `text` contains a person's data, or a secret, of `kind`, a key of `RECOGNISERS`.

    Reserved domains, names of documentation, numbers for fiction and addresses of machines are no person's.
    """
    return find_kind([kind], text) is not None


def find_kind(kinds: Iterable[str], text: str) -> str | None:
    """Return the first of `kinds` that `text` contains a person's data of, or a secret; None for none."""
    if not _may_hold(text):
        return None
    plain, _ = _fold(text)
    for kind in kinds:
        if any(not _is_no_person(kind, plain, start, end) for start, end in RECOGNISERS[kind](plain)):
            return kind
    return None


def _may_hold(text: str) -> bool:
    return bool(MAY_HOLD.search(text) or LONG_RUN.search(text)) or "PRIVATE KEY" in text


def _fold(text: str) -> tuple[str, list[int] | None]:
    """Return the text as it looks, and the place of each character in `text`; None where all stay."""
    if text.isascii():
        return text, None
    plain = text.translate(_LOOKS)
    if len(plain) == len(text):
        return plain, None
    return plain, [place for place, character in enumerate(text) if _LOOKS[ord(character)]]


class _Looks(dict[int, str]):
    """What each character looks like, by its number: `str.translate` takes a tenth of the time of a loop."""

    def __missing__(self, number: int) -> str:
        self[number] = plain = _look(chr(number))
        return plain


_LOOKS = _Looks()


def _look(character: str) -> str:
    """Return the plain character that one looks like; empty for an invisible one."""
    if character.isascii():
        return character
    match unicodedata.category(character):
        case "Cf" | "Mn" | "Me":
            return "" if unicodedata.category(character) == "Cf" else character
        case "Zs":
            return " "
        case "Pd":
            return "-"
    plain = unicodedata.normalize("NFKC", character)
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    return plain if len(plain) == 1 and plain.isascii() else character


def _outside_ibans(text: str, spans: Sequence[Span]) -> Iterator[Span]:
    """Yield the spans that begin outside any IBAN, whose groups may look like another number."""
    ibans = list(find_ibans(text)) if spans else []
    place = 0
    for start, end in spans:
        while place < len(ibans) and ibans[place][1] <= start:
            place += 1
        if place == len(ibans) or start < ibans[place][0]:
            yield start, end


def _is_international(match: re.Match[str]) -> bool:
    """Return whether digits behind + or 00 begin with a country code and are as many as there can be."""
    digits = _digits(match.group()[len(match.group(1)) :])
    code = COUNTRY_CODE.match(digits)
    if code is None:
        return False
    national = digits[code.end() :].removeprefix("0")
    if code.group() == "1":
        return re.fullmatch(r"[2-9]\d{9}", national) is not None
    separators = re.sub(r"\d", "", match.group()[len(match.group(1)) :])
    if separators == ".":  # +48.85661 is a latitude
        return len(national) >= 8
    return 7 <= len(national) <= 12 or (len(national) == 6 and bool(separators))


def _is_national(text: str) -> bool:
    """Return whether digits with a leading 0 are a phone number, and not a date, an ISBN or an example."""
    digits = _digits(text)
    if not 9 <= len(digits) <= 12 or DATE.match(text.lstrip("(")) or SSN.fullmatch(text):
        return False
    groups = re.findall(r"\d+", text)
    if all(len(group) == 2 for group in groups) and (len(groups) != 5 or _counts_on(text)):
        return False
    if digits != text:
        return True
    weighted = sum((10 - place) * int(digit) for place, digit in enumerate(digits))
    is_isbn = len(digits) == 10 and weighted % 11 == 0
    return len(digits) in (10, 11) and not is_isbn and digits not in "01234567890"


def _counts_on(text: str) -> bool:
    """Return whether the numbers in a text grow by the same step: 05 10 15 20 25."""
    numbers = [int(group) for group in re.findall(r"\d+", text)]
    return len({after - before for before, after in pairwise(numbers)}) == 1


def _find_card_end(text: str, start: re.Match[str]) -> int | None:
    """Return where a card number ends that begins with the group of digits `start`."""
    digits, end = start.group(), start.end()
    one_by_one = len(digits) == 1
    if one_by_one and IN_A_LIST.search(text[max(0, start.start() - 3) : start.start()]):
        return None
    if not one_by_one and len(digits) < 4:
        return None
    while len(digits) <= 19:
        following = CARD_GROUP.match(text, end)
        if len(digits) > 12 and _is_card(digits) and not (one_by_one and following):
            return end
        if following is None or (one_by_one and len(following.group(1)) > 1):
            return None
        group = following.group(1)
        digits, end = digits + group, following.end()
        if not one_by_one and len(group) < 4:  # the last one
            return end if _is_card(digits) else None
    return None


def _is_card(digits: str) -> bool:
    """Return whether digits can be a whole card number."""
    if not any(start.match(digits) and len(digits) in lengths for start, lengths in CARD_LENGTHS):
        return False
    doubled = sum(sum(divmod(2 * int(d), 10)) for d in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0 and len(set(digits)) > 1


def _is_no_person(kind: str, text: str, start: int, end: int) -> bool:
    found = text[start:end]
    match kind:
        case "email":
            return _is_documented_email(found.casefold())
        case "phone":
            return FICTION.match(_digits(found)) is not None or TOLL_FREE.match(_digits(found)) is not None
        case "ipv4":
            before = text[max(0, start - 16) : start]
            return NUMBERED.search(before) is not None or NETWORK.match(text, end) is not None
        case "ssn":
            return found in VOID_SSNS
    return False


def _is_documented_email(address: str) -> bool:
    local, _, domain = address.partition("@")
    if RESERVED_DOMAIN.search(domain) or FILE.search(domain):
        return True
    if MACHINE.fullmatch(local) or DOCUMENTED.fullmatch(local):
        return True
    return bool(ANYONE.fullmatch(local) and ANY_DOMAIN.match(domain))


def _digits(text: str) -> str:
    return re.sub(r"\D", "", text)
