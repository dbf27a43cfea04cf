"""A chat's messages as a prompt: by the tokenizer's own template, or a plain one."""

from __future__ import annotations

from typing import Any

PLAIN = """{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}
{% endfor %}assistant:"""
PLAIN_STOP = "\nuser:"  # a model that goes on with the plain template would write the next question itself


class TemplateError(Exception):
    """The template refuses the messages."""


def chat_prompt(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[str]]:
    """Return the prompt's tokens and the texts at which an answer ends. Raises TemplateError with the template's reason."""
    import jinja2

    own = getattr(tokenizer, "chat_template", None)
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            messages,
            chat_template=None if own else PLAIN,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
        )
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise TemplateError(f"the model's chat template refuses these messages: {error}") from error
    return ids, [] if own else [PLAIN_STOP]
