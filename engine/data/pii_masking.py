"""Mask e-mail addresses and secrets: find them by regular expressions and replace them by a placeholder."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

Masker = Callable[[str, "Counter[str]"], str]

# An address as RFC 5322's dot-atom and a host name have it; the look-behind keeps the search linear in long words.
EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9](?:[A-Za-z0-9._%+-]{0,62}[A-Za-z0-9_%+-])?@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+[A-Za-z]{2,24}\b(?!\()"
)
# Formats that their issuers document, each with a string that must be in the text before the slower pattern is tried.
# Where a pattern has a group, the group is the secret.
SECRETS: tuple[tuple[tuple[str, ...], re.Pattern[str]], ...] = tuple(
    (hints, re.compile(pattern))
    for hints, pattern in (
        (
            ("PRIVATE KEY",),
            r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----[\s\S]{0,20000}?-----END (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----",
        ),
        (("AKIA", "ASIA", "ABIA", "ACCA"), r"(?<![A-Z0-9])(?:AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}(?![A-Z0-9])"),
        (
            ("aws", "AWS", "Aws", "secret", "SECRET", "Secret"),
            r"(?i:aws|secret)[A-Za-z_ .-]{0,30}[\"']?\s{0,3}(?:=>|[:=])\s{0,3}[\"']?((?=[A-Za-z0-9/+]{0,39}[0-9])(?=[A-Za-z0-9/+]{0,39}[A-Z])(?=[A-Za-z0-9/+]{0,39}[a-z])[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        ),
        (("ghp_", "gho_", "ghu_", "ghs_", "ghr_"), r"(?<![A-Za-z0-9])gh[pousr]_[A-Za-z0-9]{36,255}(?![A-Za-z0-9])"),
        (("github_pat_",), r"(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{22,255}"),
        (("glpat-",), r"(?<![A-Za-z0-9])glpat-[A-Za-z0-9_-]{20,255}"),
        (("xox",), r"(?<![A-Za-z0-9])xox[abeoprs]-[A-Za-z0-9-]{10,255}"),
        (("hooks.slack.com",), r"https://hooks\.slack\.com/(?:services|workflows)/[A-Za-z0-9+/]{20,255}"),
        (("sk-",), r"(?<![A-Za-z0-9_-])sk-(?=[A-Za-z0-9_-]{0,200}[0-9])(?=[A-Za-z0-9_-]{0,200}[A-Z])[A-Za-z0-9_-]{20,255}"),
        (("sk_live_", "sk_test_", "rk_live_", "rk_test_"), r"(?<![A-Za-z0-9])[sr]k_(?:live|test)_[A-Za-z0-9]{16,255}"),
        (("hf_",), r"(?<![A-Za-z0-9_])hf_[A-Za-z0-9]{34,255}"),
        (("npm_",), r"(?<![A-Za-z0-9_])npm_[A-Za-z0-9]{36}(?![A-Za-z0-9])"),
        (("AIza",), r"(?<![A-Za-z0-9_-])AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
        (("eyJ",), r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,4000}\.eyJ[A-Za-z0-9_-]{8,8000}\.[A-Za-z0-9_-]{8,2000}"),
        (("earer ", "EARER "), r"(?<![A-Za-z0-9])(?i:bearer) ((?=[A-Za-z0-9._~+/-]{0,200}[0-9])[A-Za-z0-9._~+/-]{20,4000}={0,2})"),
        (("://",), r"(?<![A-Za-z0-9])[a-z][a-z0-9+.-]{1,20}://[A-Za-z0-9._~%!$&*+,;=-]{0,255}:([^\s:/@\"'<>{}$%\[\]()]{3,255})@(?=[A-Za-z0-9.-])"),
    )
)  # fmt: skip


def make_masker(kinds: Sequence[str]) -> Masker | None:
    """Return a function (text, counts) -> text with `<email>` and `<secret>` as placeholders, counted; None for no kinds."""
    steps: list[Masker] = []
    if "secrets" in kinds:
        steps.append(mask_secrets)  # first: a password in an address would look like an e-mail
    if "emails" in kinds:
        steps.append(mask_emails)
    if not steps:
        return None

    def mask(text: str, counts: Counter[str]) -> str:
        for step in steps:
            text = step(text, counts)
        return text

    return mask


def mask_emails(text: str, counts: Counter[str]) -> str:
    """Replace e-mail addresses."""
    if "@" not in text:
        return text
    text, count = EMAIL.subn("<email>", text)
    if count:
        counts["emails"] += count
    return text


def mask_secrets(text: str, counts: Counter[str]) -> str:
    """Replace keys, tokens and passwords that have a known format."""
    for hints, pattern in SECRETS:
        if any(hint in text for hint in hints):
            text, count = pattern.subn(_without_secret, text)
            if count:
                counts["secrets"] += count
    return text


def _without_secret(match: re.Match[str]) -> str:
    if not match.re.groups:
        return "<secret>"
    start, end = match.start(1) - match.start(), match.end(1) - match.start()
    return f"{match[0][:start]}<secret>{match[0][end:]}"
