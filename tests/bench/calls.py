"""A minimal HTTP client: the cost of a full client such as httpx would be measured with the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any


class Caller:
    """A client with one persistent connection."""

    def __init__(self, port: int, secret: str = "") -> None:
        self.port, self.secret = port, secret

    async def __aenter__(self) -> Caller:
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *error: object) -> None:
        self.writer.close()

    async def post(self, path: str, body: dict[str, Any]) -> Any:
        """Return the response's JSON. Raises AssertionError for a status other than 200."""
        length = (await self._headers(path, body))["content-length"]
        return json.loads(await self.reader.readexactly(int(length)))

    async def stream(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the events of a streamed response. Raises AssertionError for a status other than 200."""
        await self._headers(path, body)
        lines = b""
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            lines += (await self.reader.readexactly(size + 2))[:-2]
        await self.reader.readexactly(2)
        data = [line[6:] for line in lines.decode().splitlines() if line.startswith("data: ")]
        return [json.loads(event) for event in data if event != "[DONE]"]

    async def _headers(self, path: str, body: dict[str, Any]) -> dict[str, str]:
        content = json.dumps(body).encode()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {self.secret}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        )
        self.writer.write(head.encode() + content)
        status, *headers = (await self.reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        assert " 200 " in status, status
        pairs = (header.partition(":") for header in headers if header)
        return {name: value.strip() for name, _, value in pairs}
