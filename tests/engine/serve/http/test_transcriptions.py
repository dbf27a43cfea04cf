"""/v1/audio/transcriptions of a real endpoint: by OpenAI's own client, and by those who send something else."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from engine.bundles.bundle import Bundle
from engine.config import Config, with_values
from engine.data.audio import encode_wav
from engine.serve.deploy import Endpoint, deploy
from engine.serve.http.api_keys import new_key
from tests.engine.bundles.small_bundles import fresh_bundle, taught_bundle
from tests.engine.data.audio_samples import file_of, hum, hummed_table
from tests.engine.objectives.conftest import FAMILIES
from tests.engine.serve.clients import wait_for
from tests.engine.serve.http.test_access_control import browser_page  # noqa: F401
from tests.ports import free_port

PATH = "/v1/audio/transcriptions"
SPEECH = {
    "one": file_of(hum("one", 8000), 8000),
    "two three": file_of(hum("two three", 44100), 44100, "OGG"),
    "three one two": file_of(hum("three one two", 16000), 16000, "FLAC"),
}


@dataclass(frozen=True)
class Listening:
    """An endpoint that hears, its bundle, and the secrets of its keys."""

    config: Config
    endpoint: Endpoint
    bundle: Bundle
    secrets: dict[str, str]

    def openai(self, key: str = "free") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.endpoint.url}/v1", api_key=self.secrets[key], max_retries=0)

    def post(self, file: Any = SPEECH["one"], key: str = "free", **fields: Any) -> httpx.Response:
        files = None if file is None else {"file": ("a.wav", file)}
        headers = {"Authorization": f"Bearer {self.secrets[key]}"}
        return httpx.post(self.endpoint.url + PATH, files=files, data=fields, headers=headers, timeout=60)

    def right(self, *contents: bytes) -> list[dict[str, Any]]:
        return self.bundle.objective().predict(self.bundle.model(), [{"audio": content} for content in contents])


@pytest.fixture(scope="module")
def listening(
    ray: None, tiny: Config, tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Listening]:
    folder = tmp_path_factory.mktemp("listening")
    table = hummed_table(folder / "train.parquet", 200)
    speech = with_values(
        tiny,
        {**FAMILIES["speech_recognition"], "objective.name": "speech_recognition", "data.source": "files",
         "data.path": str(table), "data.audio_column": "audio", "data.text_column": "words", "data.audio_seconds": 1,
         "data.name": "hummed", "data.max_documents": None, "data.validation_fraction": 0.2, "runs_dir": str(folder)},
    )  # fmt: skip
    bundle = taught_bundle(speech, folder / "listener" / "bundle", 220)
    namer = fresh_bundle(tiny_functions, folder / "namer" / "bundle")
    config = with_values(
        speech, {"name": "listening", "serve.port": free_port(), "serve.max_replicas": 1, "serve.max_audio_bytes": 200_000}
    )  # fmt: skip
    limits = {"free": None, "few": 60}
    secrets = {name: new_key(config.keys_file, name, None, tokens, None)[0] for name, tokens in limits.items()}
    up = deploy(config, {"listener": bundle.folder, "namer": namer.folder})
    yield Listening(config, up, bundle, secrets)
    up.stop()


def test_openais_client_gets_each_form(listening: Listening) -> None:
    api = listening.openai()
    for (words, content), right in zip(SPEECH.items(), listening.right(*SPEECH.values()), strict=True):
        found = api.audio.transcriptions.create(model="listener", file=("speech.wav", content))
        assert found.text == right["text"] == words
        seconds = len(listening.bundle.objective().prepare({"audio": content})["sound"]) / 16000
        assert found.usage is not None
        assert found.usage.type == "tokens"
        assert (found.usage.input_tokens, found.usage.output_tokens) == (math.ceil(50 * seconds), len(right["tokens"]))
        plain = api.audio.transcriptions.create(model="listener", file=("speech.wav", content), response_format="text")
        assert plain == right["text"]
        whole = api.audio.transcriptions.create(
            model="listener", file=("speech.wav", content), response_format="verbose_json", temperature=0
        )
        assert (whole.text, whole.duration) == (right["text"], pytest.approx(seconds))
        assert whole.segments
        (segment,) = whole.segments
        assert (segment.tokens, segment.end) == (right["tokens"], pytest.approx(seconds))
        assert -20 < segment.avg_logprob < 0


def test_company_changes_nothing(listening: Listening) -> None:
    contents = list(SPEECH.values()) * 4
    with ThreadPoolExecutor(len(contents)) as pool:
        answers = list(pool.map(listening.post, contents))
    assert [answer.json()["text"] for answer in answers] == [it["text"] for it in listening.right(*contents)]

    def told(name: str) -> float:
        page = httpx.get(f"{listening.endpoint.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in page if line.startswith(name) and '"listener"' in line)

    def shared() -> bool:  # asked again where each came after the other's forward
        with ThreadPoolExecutor(len(contents)) as pool:
            list(pool.map(listening.post, contents))
        return told("manta_replica_rows") > told("manta_replica_forwards") > 0

    wait_for(shared)
    assert told("manta_requests_total") >= len(contents)


def test_it_is_the_only_model_that_hears(listening: Listening) -> None:
    assert listening.post().json()["text"] == listening.right(SPEECH["one"])[0]["text"]
    models = httpx.get(f"{listening.endpoint.url}/v1/models", headers={"Authorization": f"Bearer {listening.secrets['free']}"})  # fmt: skip
    assert {it["id"]: it["task"] for it in models.json()["data"]}["listener"] == "transcription"
    schema = httpx.get(f"{listening.endpoint.url}/openapi.json").json()["paths"][PATH]["post"]["requestBody"]
    assert {"file", "model", "temperature"} <= schema["content"]["multipart/form-data"]["schema"]["properties"].keys()


@pytest.mark.parametrize(
    ("file", "fields", "param", "said"),
    [
        (b"no sound", {}, "file", "cannot be read: send a WAV, FLAC, OGG or MP3 file"),
        (b"", {}, "file", "it is empty"),
        (encode_wav(np.zeros(0, np.int16), 8000), {}, "file", "the sound is empty"),
        (file_of(hum("one two three one two", 8000), 8000), {}, "file", "longer than the 1 s"),
        (None, {"model": "listener"}, "file", "multipart/form-data"),
        (SPEECH["one"], {"model": "namer"}, "model", "model 'namer' does classification, not transcription"),
        (SPEECH["one"], {"temperature": "2"}, "temperature", "less than or equal to 1"),
        (SPEECH["one"], {"temperature": "nan"}, "temperature", "finite"),
        (SPEECH["one"], {"response_format": "srt"}, "response_format", "'json', 'text' or 'verbose_json'"),
        (SPEECH["one"], {"language": "en"}, "language", "leave it out"),
        (SPEECH["one"], {"prompt": "names"}, "prompt", "no such option"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_openais_form(
    listening: Listening, file: bytes | None, fields: dict[str, str], param: str, said: str
) -> None:
    answer = listening.post(file, **fields)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert said in error["message"]


def test_other_refusals(listening: Listening) -> None:
    assert listening.post(model="nobody").status_code == 404
    large = listening.post(encode_wav(np.zeros(150_000, np.int16), 8000))
    assert (large.status_code, "200,000 bytes" in large.text) == (413, True)
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
    wait_for(lambda: "s of sound" in (page.text_content("article .times") or ""))
    assert page.text_content("article .said") == listening.right(SPEECH["one"])[0]["text"]
    page.click("article .up")
    page.wait_for_selector('article .up[aria-pressed="true"]')


def test_a_temperature_draws(listening: Listening) -> None:  # the last: a second model that hears is deployed
    unsure = fresh_bundle(listening.config, listening.bundle.folder.parents[1] / "unsure" / "bundle", spread=1)
    deploy(listening.config, {"unsure": unsure.folder})
    drawn, likeliest = (
        {listening.post(model="unsure", temperature=temperature).json()["text"] for _ in range(8)}
        for temperature in ("1", "0")
    )
    assert len(drawn) > 1
    assert len(likeliest) == 1
