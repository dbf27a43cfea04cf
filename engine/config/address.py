"""Checks of addresses: of stores (s3://, gs://) and of HTTP servers."""

from __future__ import annotations

import re

from engine.errors import UserError


def check_address(key: str, address: str | None) -> None:
    """Raise UserError for an address with a password in it."""
    if re.search(r"[a-z0-9]://[^/@]*:[^/]*@", address or "", re.IGNORECASE):
        raise UserError(
            f"{key} has a password in it: leave it out (a store's client finds credentials in the environment)"
        )


def check_http_address(key: str, address: str | None, example: str) -> None:
    """Raise UserError for an address that is not one of HTTP, or has a password in it."""
    check_address(key, address)
    if address and not re.match(r"https?://[^/]", address):
        raise UserError(f"{key}={address} is not an HTTP address: use {example}, for example")
