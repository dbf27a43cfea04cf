import time
from collections import Counter

import pytest

from engine.data.pii_masking import make_masker, mask_emails, mask_secrets

# Put together here, so that no scanner of this repository takes them for real ones.
LETTERS = "aB3dE5gH7jK9mN1pQ2rS4tU6vW8xY0zA1bC2dE3fG4"
KEYS = {
    "aws": "AKIA" + "QYLPMN5HFIQR7XYA",
    "github": "ghp_" + LETTERS[:36],
    "github fine-grained": "github_pat_" + LETTERS[:22] + "_" + LETTERS,
    "gitlab": "glpat-" + LETTERS[:20],
    "slack": "xoxb-" + "123456789012-1234567890123-" + LETTERS[:24],
    "openai": "sk-" + LETTERS + "00",
    "openai project": "sk-proj-" + LETTERS + "_-" + LETTERS,
    "anthropic": "sk-ant-api03-" + LETTERS + "-" + LETTERS,
    "stripe": "sk_" + "live_" + LETTERS[:24],
    "hugging face": "hf_" + LETTERS[:34],
    "npm": "npm_" + LETTERS[:36],
    "google": "AIza" + LETTERS[:35],
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0" + ".dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U",
    "slack hook": "https://hooks.slack.com/services/" + "T00000000/B00000000/" + LETTERS[:24],
    "private key": "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEow\nIBAAKC+/=\n-----END RSA PRIVATE KEY-----",
    "private pgp": "-----BEGIN PGP PRIVATE " + "KEY BLOCK-----\n\nlQOY\n-----END PGP PRIVATE KEY BLOCK-----",
}


@pytest.mark.parametrize("kind", KEYS)
def test_secrets_are_masked_anywhere_in_a_text(kind: str) -> None:
    for before, after in (("", ""), ("key = '", "'\n"), ("(see ", ")."), ("export TOKEN=", "\nnext"), ('{"k":"', '"}')):
        counts: Counter[str] = Counter()
        assert mask_secrets(before + KEYS[kind] + after, counts) == f"{before}<secret>{after}"
        assert counts == {"secrets": 1}


def test_text_around_a_secret_is_kept() -> None:
    counts: Counter[str] = Counter()
    text = f"""aws_secret_access_key = {LETTERS[:40]}
Authorization: Bearer {LETTERS[:30]}
postgres://admin:{LETTERS[:12]}@db.example.org/sales"""
    expected = """aws_secret_access_key = <secret>
Authorization: Bearer <secret>
postgres://admin:<secret>@db.example.org/sales"""
    assert mask_secrets(text, counts) == expected
    assert counts == {"secrets": 3}
    both = make_masker(["emails", "secrets"])
    assert both is not None
    assert both("ftp://me:pass12word@host.org me@host.org", counts) == "ftp://me:<secret>@host.org <email>"


def test_email_addresses() -> None:
    counts: Counter[str] = Counter()
    text = "Write to jane.doe+list@mail.example.co.uk, <x_1@a-b.org> or mailto:bob@example.com. Not a@b, @pytest.fixture, a @ b.org."
    expected = "Write to <email>, <<email>> or mailto:<email>. Not a@b, @pytest.fixture, a @ b.org."
    assert mask_emails(text, counts) == expected
    assert counts == {"emails": 3}
    assert make_masker([]) is None


@pytest.mark.parametrize(
    "text",
    [
        "@app.get('/x')\nclass A(B): pass  # matrix a @b.T",
        "sk-learn and task-oriented-dialogue-with-many-words-and-more-words",
        "https://example.org:8080/path?x=1 and redis://localhost:6379/0",
        "def bearer token_bearer_is_a_long_identifier_name(): AKIA eyJ xoxb- hf_hub_download",
        "commit 3f786850e387550fdab836ed7e6dc881de23001b, secret santa; https://{user}:{password}@host",
        "hf_model_name_or_path_for_the_embedding_x AIza npm_config_registry_and_other_settings_of_it_all",
    ],
)  # fmt: skip
def test_plain_text_is_unchanged(text: str) -> None:
    counts: Counter[str] = Counter()
    assert mask_emails(mask_secrets(text, counts), counts) == text
    assert not counts


@pytest.mark.parametrize("text", ["a" * 300_000 + "@", "a.b-" * 100_000 + "@", "eyJ" * 100_000 + "://", "sk-" * 100_000,
                                  "http://a:" * 30_000, "-----BEGIN PRIVATE KEY-----" * 300, "secret = " * 30_000, "xoxb-a-" * 50_000])  # fmt: skip
def test_masking_time_is_linear(text: str) -> None:
    began = time.process_time()
    mask_emails(mask_secrets(text, Counter()), Counter())
    assert time.process_time() - began < 5
