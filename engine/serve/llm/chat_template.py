"""Turns a chat's messages into a prompt, by the tokenizer's chat template or a plain one."""

from __future__ import annotations

from typing import Any

PLAIN_TEMPLATE = """{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}
{% endfor %}assistant:"""
PLAIN_STOP = "\nuser:"  # with the plain template, a model would otherwise write the next question itself


class TemplateError(Exception):
    """The chat template rejects the messages."""


def chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[str]]:
    """Return the prompt's tokens and the stop texts of an answer. Raises TemplateError with the template's reason."""
    import jinja2

    has_template = bool(getattr(tokenizer, "chat_template", None))
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages,
            chat_template=None if has_template else PLAIN_TEMPLATE,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise TemplateError(f"the model's chat template refuses these messages: {error}") from error
    return ids, [] if has_template else [PLAIN_STOP]
