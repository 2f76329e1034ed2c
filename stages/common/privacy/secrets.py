"""Find secrets in a text: keys, tokens and passwords, by their form.

Every repetition in the patterns is bounded or possessive, so that matching takes time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

Span = tuple[int, int]

# A value that a person or a program chose as a secret: a letter and a digit, no path, no call, no variable.
_MIXED = r"(?=[^\s\"'`]{0,128}\d)(?=[^\s\"'`]{0,128}[A-Za-z])"
_PASSWORD = (
    r"(?:passw(?:or)?d|passphrase|passcode|pwd|passwort|kennwort|mot de passe|contrase(?:ñ|n)a|parola|senha"
    r"|wachtwoord|пароль|密码|(?<![^\W_])(?:pw|pass))"
)
_NAMED = (
    r"(?:api[_ -]?key|secret(?:[_ -]?(?:key|access[_ -]?key|token))?"
    r"|(?:access|auth|bearer|refresh|bot|api|session)[_ -]?token"
    r"|client[_ -]?secret|(?<![^\W_])token|private[_ -]?key"
    r"|(?:encryption|signing|account|access|master)[_ -]?key)"
)
_IS = r"[\"'`]?\s{0,8}(?::=|[=-]>|→|[:=])\s{0,8}"
_WORD = r"[^\s\"'`<>(){}\[\]$,;]"  # of a value without quotes: a bracket or a $ makes it code

# Secrets with a fixed prefix are in the formats that secret scanners use (gitleaks, detect-secrets).
SECRETS: dict[str, re.Pattern[str]] = {
    # With the lines of the key behind its heading; a key that was cut off has no end.
    "private_key": re.compile(
        r"-----BEGIN (?:[A-Z0-9]{1,16} ){0,3}PRIVATE KEY(?: BLOCK)?-----"
        r"(?:(?:\s|\\[nr])*+(?:[A-Za-z0-9+/=]{16,}+|[A-Z][\w-]{2,20}: [\w,.-]{1,80}))*+"
        r"(?:(?:(?:\s|\\[nr])*+=?[A-Za-z0-9+/=]{1,64}+)?(?:\s|\\[nr])*+-----END[^\n-]{0,60}-----)?"
        r"|PuTTY-User-Key-File-[23]:"
    ),
    "aws_access_key": re.compile(r"(?<![A-Z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Z0-9])"),
    "google_api_key": re.compile(r"(?<![\w-])AIza[\w-]{35}(?![\w-])"),
    "google_oauth": re.compile(r"(?<![\w-])(?:GOCSPX-[\w-]{28}|ya29\.[\w-]{20,512})"),
    "github_token": re.compile(r"(?<![\w-])(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_\w{60,255})"),
    "gitlab_token": re.compile(r"(?<![\w-])gl(?:pat|ptt|dt|rt|cbt|oas|soat)-[\w-]{20,64}"),
    "slack_token": re.compile(
        r"(?<![\w-])(?:xox[abeoprs]|xapp)-[\w-]{10,250}|hooks\.slack\.com/(?:services|workflows)/[\w/+-]{40,80}"
    ),
    "stripe_key": re.compile(
        r"(?<![\w-])(?:(?:sk|rk)_(?:live|test|prod)_[A-Za-z0-9]{10,99}|whsec_[\w+/=-]{24,99})"
    ),
    "openai_key": re.compile(r"(?<![\w-])sk-(?:proj-|svcacct-|admin-|or-v1-)?[\w-]{32,200}"),
    "anthropic_key": re.compile(r"(?<![\w-])sk-ant-[\w-]{20,200}"),
    "huggingface_token": re.compile(r"(?<![\w-])(?:hf|api_org)_[A-Za-z]{34}(?![A-Za-z])"),
    "pypi_token": re.compile(r"(?<![\w-])pypi-AgE[\w-]{50,1000}"),
    "npm_token": re.compile(r"(?<![\w-])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
    "sendgrid_key": re.compile(r"(?<![\w-])SG\.[\w-]{16,32}\.[\w-]{16,64}"),
    "telegram_token": re.compile(r"(?<!\d)\d{8,10}:AA[\w-]{32,33}(?![\w-])"),
    "discord_token": re.compile(r"(?<![\w-])[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}(?![\w-])"),
    "azure_key": re.compile(r"AccountKey=[A-Za-z0-9+/]{86}=="),
    "digitalocean_token": re.compile(r"(?<![\w-])do[opr]_v1_[a-f0-9]{64}"),
    "vault_token": re.compile(r"(?<![\w-])hv[sb]\.[\w-]{24,300}"),
    "age_key": re.compile(r"AGE-SECRET-KEY-1[A-Z0-9]{58}"),
    "perennial_key": re.compile(r"(?<![\w-])perennial-[\w-]{43}(?![\w-])"),
    "vendor_token": re.compile(
        r"(?<![\w-])(?:gsk_[A-Za-z0-9]{48,56}|xai-[A-Za-z0-9]{60,90}|r8_[A-Za-z0-9]{37}|dapi[a-f0-9]{32}"
        r"|shp(?:at|ca|pa|ss)_[a-f0-9]{32}|dckr_(?:pat|oat)_[\w-]{27,40}|gl(?:sa|c)_[\w=]{32,200}"
        r"|lin_api_[A-Za-z0-9]{40}|ntn_[A-Za-z0-9]{40,50}|sbp_[a-f0-9]{40}|key-[a-f0-9]{32}|SK[a-f0-9]{32}"
        r"|NRAK-[A-Z0-9]{27}|PMAK-[a-f0-9]{24}-[a-f0-9]{34}|pplx-[A-Za-z0-9]{40,56}|figd_[\w-]{40}"
        r"|rubygems_[a-f0-9]{48}|sntry[su]_[\w+/=]{40,300}|ATATT3[\w=-]{60,300}|sq0[a-z]{3}-[\w-]{22,43})"
        r"(?![\w-])"
    ),
    "json_web_token": re.compile(r"(?<![\w-])eyJ[\w-]{10,4096}\.eyJ[\w-]{10,4096}\.[\w-]{10,4096}"),
    "password_in_url": re.compile(
        r"(?<![a-z0-9])[a-z][a-z0-9+.-]{1,20}://[^\s/:@\"'<>]{0,128}:[^\s/:@\"'<>]{3,128}@[\w.\[-]", re.I
    ),
    "authorization": re.compile(
        r"\b(?:bearer\s{1,4}(?=[\w.~+/=-]{0,512}\d)[\w.~+/-]{20,512}={0,2}"
        r"|authorization[\"']?\s{0,4}[:=]\s{0,4}[\"']?(?:basic|token)\s{1,4}[\w.~+/-]{8,512}={0,2})",
        re.I,
    ),
    "command_line_password": re.compile(
        r"(?<!\S)(?:-u|--user)[ =][\"']?(?!\d{1,9}:\d{1,9}(?!\S))[\w.@-]{1,64}:"
        r"(?=[^\s\"']{0,128}\d)[^\s\"']{6,128}"
    ),
    "assigned_secret": re.compile(
        rf"{_PASSWORD}{_IS}[\"'](?=[^\"'\s]{{0,128}}\d)[^\"'\s]{{6,128}}[\"']"
        rf"|{_NAMED}{_IS}[\"'](?=[^\"'\s]{{0,128}}\d)[^\"'\s]{{12,128}}[\"']"
        rf"|{_PASSWORD}{_IS}{_MIXED}(?![~./]){_WORD}{{6,128}}+(?![(\[{{])"
        rf"|{_NAMED}{_IS}{_MIXED}(?![~./]){_WORD}{{16,128}}+(?![(\[{{])",
        re.I,
    ),
    "environment_secret": re.compile(
        r"(?<![A-Za-z0-9_])[A-Z][A-Z0-9_]{0,40}(?:TOKEN|SECRET|PASSWORD|_KEY|APIKEY)(?:_[A-Z0-9]{1,10})?"
        rf"\s?[=:]\s?[\"']?{_MIXED}(?![~./]){_WORD}{{16,128}}+(?![(\[{{])"
        r"|(?<![A-Za-z0-9_])(?:[A-Z][A-Z0-9_]{0,40}_)?(?:TOKEN|SECRET|PASSWORD|PASSWD|PASS|PWD)"
        rf"=[\"']?{_MIXED}(?![~./]){_WORD}{{12,128}}+(?![(\[{{])"
    ),
    "told_secret": re.compile(
        rf"\b{_PASSWORD}(?:\s(?:for|of|to|on|in|für|de|pour)\s[^\n.?!]{{1,40}}?)?"
        rf"\s(?:is|was|ist|lautet|est|es|to|è|é)(?:\snow)?:?\s[\"'`“«]?{_MIXED}(?![~./]){_WORD}{{6,128}}+(?![(\[{{])"
        rf"|\b(?:{_NAMED}|key)\s(?:is|was):?\s[\"'`]?{_MIXED}(?![~./]){_WORD}{{16,128}}+(?![(\[{{])"
        r"|\bpin(?:[\s_](?:code|number))?(?:\sis\s|:\s?[\"']?)\d{4,8}\b",
        re.I,
    ),
}
# A text without any of these, in small letters, holds no secret of the kind; looking for them costs little.
HINTS: dict[str, tuple[str, ...]] = {
    "private_key": ("private key", "putty"),
    "aws_access_key": ("akia", "asia", "abia", "acca"),
    "google_api_key": ("aiza",),
    "google_oauth": ("gocspx-", "ya29."),
    "github_token": ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
    "gitlab_token": ("gl",),
    "slack_token": ("xox", "xapp-", "hooks.slack.com"),
    "stripe_key": ("sk_", "rk_", "whsec_"),
    "openai_key": ("sk-",),
    "anthropic_key": ("sk-ant-",),
    "huggingface_token": ("hf_", "api_org_"),
    "pypi_token": ("pypi-",),
    "npm_token": ("npm_",),
    "sendgrid_key": ("sg.",),
    "telegram_token": (":aa",),
    "azure_key": ("accountkey=",),
    "digitalocean_token": ("_v1_",),
    "vault_token": ("hvs.", "hvb."),
    "age_key": ("age-secret-key",),
    "perennial_key": ("perennial-",),
    "json_web_token": ("eyj",),
    "password_in_url": ("://",),
    "authorization": ("bearer", "authorization"),
    "command_line_password": ("-u", "--user"),
    "assigned_secret": ("=", ":", "->", "→"),
    "environment_secret": ("token", "secret", "pass", "pwd", "key"),
    "told_secret": (" is", " was", " ist", " lautet", " est", " es", " to", " è", " é", "pin"),
}
# The words that tell a password or a key; some are one way of writing several.
NAMES = (
    *("pass", "pw", "kennwort", "contrase", "parola", "senha", "wachtwoord", "пароль", "密码"),
    *("key", "secret", "token"),
)
NAMED = ("assigned_secret", "told_secret")
EXAMPLE = re.compile(r"x{6}|\*{4}|\.\.\.|example|placeholder|your[_-]|changeme|<[a-z_-]+>", re.I)


def find_named_secrets(text: str) -> Iterator[tuple[str, Span]]:
    """Yield the kind and the span of each secret; placeholders as documentation uses them do not count."""
    small = text.casefold()
    named = any(name in small for name in (*NAMES, "pin"))
    for kind, pattern in SECRETS.items():
        if not any(hint in small for hint in HINTS.get(kind, ("",))) or (kind in NAMED and not named):
            continue
        for match in pattern.finditer(text):
            if not EXAMPLE.search(match.group()):
                yield kind, match.span()


def find_secrets(text: str) -> Iterator[Span]:
    """Yield the spans of secrets, by kind and then from left to right."""
    for _, span in find_named_secrets(text):
        yield span
