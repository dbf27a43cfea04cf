"""/v1/audio/transcriptions of a real endpoint: by OpenAI's own client, and by those who send something else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai

from engine.bundles.bundle import Bundle
from engine.serve.deploy import Endpoint
from tests.engine.data.sounds import file_of, hum
from tests.engine.serve.clients import wait_for
from tests.engine.serve.test_access import browser_page  # noqa: F401

PATH = "/v1/audio/transcriptions"
SPEECH = {
    "one": file_of(hum("one", 8000), 8000),
    "two three": file_of(hum("two three", 44100), 44100, "OGG"),
    "three one two": file_of(hum("three one two", 16000), 16000, "FLAC"),
}


@dataclass(frozen=True)
class Listening:
    """An endpoint that hears, its bundle, and the secrets of its keys."""

    endpoint: Endpoint
    bundle: Bundle
    secrets: dict[str, str]

    def openai(self, key: str = "free") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.endpoint.url}/v1", api_key=self.secrets[key], max_retries=0)

    def post(self, file: Any = SPEECH["one"], key: str = "free", **fields: Any) -> httpx.Response:
        files = None if file is None else {"file": ("a.wav", file)}
        headers = {"Authorization": f"Bearer {listening.secrets['free']}"}

    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    torn = httpx.post(listening.endpoint.url + PATH, content=b"--x\r\nContent-Disp", headers=headers | kind)
    assert torn.status_code == 400
    assert torn.json()["error"]["type"] == "invalid_request_error"
    two = httpx.post(listening.endpoint.url + PATH, files=[("file", ("a.wav", SPEECH["one"]))] * 2, headers=headers)
    assert (two.status_code, "Too many files" in two.text) == (400, True)
    assert httpx.post(listening.endpoint.url + PATH, files={"file": SPEECH["one"]}).status_code == 401


def test_a_key_hears_as_much_as_it_may(listening: Listening) -> None:
    first = listening.post(key="few")
    assert first.status_code == 200
    answers = [listening.post(key="few").status_code for _ in range(4)]
    assert answers[-1] == 429


def test_the_page_takes_a_file(listening: Listening, browser_page: Any, tmp_path: Path) -> None:  # noqa: F811
    page = browser_page
    (tmp_path / "one.wav").write_bytes(SPEECH["one"])
    page.goto(listening.endpoint.url)
    page.fill("#key", listening.secrets["free"])
    page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")
    page.select_option("#model", "listener")
    assert page.is_checked('input[value="transcription"]')
    page.set_input_files("#file", str(tmp_path / "one.wav"))
    page.click("#send")
    wait_for(lambda: "s of sound" in (page.text_content("article .times") or ""), 20)
    assert page.text_content("article .said") == listening.right(SPEECH["one"])[0]["text"]
    page.click("article .up")
    page.wait_for_selector('article .up[aria-pressed="true"]')
