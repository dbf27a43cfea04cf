"""/v1/audio/transcriptions of an endpoint: with OpenAI's client, and with invalid requests."""

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
from tests.engine.bundles.small_bundles import fresh_bundle, trained_bundle
from tests.engine.data.audio_samples import file_of, hum, hummed_table
from tests.engine.objectives.conftest import FAMILIES
from tests.engine.serve.clients import wait_for
from tests.ports import free_port

PATH = "/v1/audio/transcriptions"
SPEECH = {
    "one": file_of(hum("one", 8000), 8000),
    "two three": file_of(hum("two three", 44100), 44100, "OGG"),
    "three one two": file_of(hum("three one two", 16000), 16000, "FLAC"),
}


@dataclass(frozen=True)
class SpeechEndpoint:
    """An endpoint with a speech model, its bundle, and the secrets of its keys."""

    config: Config
    server: Endpoint
    bundle: Bundle
    secrets: dict[str, str]

    def openai(self, key: str = "free") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.server.url}/v1", api_key=self.secrets[key], max_retries=0)

    def post(self, file: Any = SPEECH["one"], key: str = "free", **fields: Any) -> httpx.Response:
        files = None if file is None else {"file": ("a.wav", file)}
        headers = {"Authorization": f"Bearer {self.secrets[key]}"}
        return httpx.post(self.server.url + PATH, files=files, data=fields, headers=headers, timeout=60)

    def expected(self, *contents: bytes) -> list[dict[str, Any]]:
        return self.bundle.objective().predict(self.bundle.model(), [{"audio": content} for content in contents])


@pytest.fixture(scope="module")
def endpoint(
    ray: None, tiny: Config, tiny_functions: Config, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SpeechEndpoint]:
    folder = tmp_path_factory.mktemp("listening")
    table = hummed_table(folder / "train.parquet", 200)
    speech = with_values(
        tiny,
        {**FAMILIES["speech_recognition"], "objective.name": "speech_recognition", "data.source": "files",
         "data.path": str(table), "data.audio_column": "audio", "data.text_column": "words", "data.audio_seconds": 1,
         "data.name": "hummed", "data.max_documents": None, "data.validation_fraction": 0.2, "runs_dir": str(folder)},
    )  # fmt: skip
    bundle = trained_bundle(speech, folder / "listener" / "bundle", 220)
    namer = fresh_bundle(tiny_functions, folder / "namer" / "bundle")
    config = with_values(
        speech, {"name": "listening", "serve.port": free_port(), "serve.max_replicas": 1, "serve.max_audio_bytes": 200_000}
    )  # fmt: skip
    limits = {"free": None, "few": 60}
    secrets = {name: new_key(config.keys_file, name, None, tokens, None)[0] for name, tokens in limits.items()}
    up = deploy(config, {"listener": bundle.folder, "namer": namer.folder})
    yield SpeechEndpoint(config, up, bundle, secrets)
    up.stop()


def test_openais_client_gets_each_response_format(endpoint: SpeechEndpoint) -> None:
    api = endpoint.openai()
    for (words, content), expected in zip(SPEECH.items(), endpoint.expected(*SPEECH.values()), strict=True):
        transcript = api.audio.transcriptions.create(model="listener", file=("speech.wav", content))
        assert transcript.text == expected["text"] == words
        seconds = len(endpoint.bundle.objective().prepare({"audio": content})["sound"]) / 16000
        assert transcript.usage is not None
        assert transcript.usage.type == "tokens"
        assert (transcript.usage.input_tokens, transcript.usage.output_tokens) == (
            math.ceil(50 * seconds),
            len(expected["tokens"]),
        )
        plain = api.audio.transcriptions.create(model="listener", file=("speech.wav", content), response_format="text")
        assert plain == expected["text"]
        verbose = api.audio.transcriptions.create(
            model="listener", file=("speech.wav", content), response_format="verbose_json", temperature=0
        )
        assert (verbose.text, verbose.duration) == (expected["text"], pytest.approx(seconds))
        assert verbose.segments
        (segment,) = verbose.segments
        assert (segment.tokens, segment.end) == (expected["tokens"], pytest.approx(seconds))
        assert -20 < segment.avg_logprob < 0


def test_batching_does_not_change_transcripts(endpoint: SpeechEndpoint) -> None:
    contents = list(SPEECH.values()) * 4
    with ThreadPoolExecutor(len(contents)) as pool:
        responses = list(pool.map(endpoint.post, contents))
    assert [response.json()["text"] for response in responses] == [
        transcript["text"] for transcript in endpoint.expected(*contents)
    ]

    def metric(name: str) -> float:
        page = httpx.get(f"{endpoint.server.url}/metrics", timeout=30).text.splitlines()
        return sum(float(line.split()[-1]) for line in page if line.startswith(name) and '"listener"' in line)

    def are_batched() -> bool:  # repeated where no two requests were in a batch
        with ThreadPoolExecutor(len(contents)) as pool:
            list(pool.map(endpoint.post, contents))
        return metric("manta_replica_rows") > metric("manta_replica_forwards") > 0

    wait_for(are_batched)
    assert metric("manta_requests_total") >= len(contents)


def test_the_only_speech_model_is_the_default(endpoint: SpeechEndpoint) -> None:
    assert endpoint.post().json()["text"] == endpoint.expected(SPEECH["one"])[0]["text"]
    models = httpx.get(f"{endpoint.server.url}/v1/models", headers={"Authorization": f"Bearer {endpoint.secrets['free']}"})  # fmt: skip
    assert {model["id"]: model["task"] for model in models.json()["data"]}["listener"] == "transcription"
    schema = httpx.get(f"{endpoint.server.url}/openapi.json").json()["paths"][PATH]["post"]["requestBody"]
    assert {"file", "model", "temperature"} <= schema["content"]["multipart/form-data"]["schema"]["properties"].keys()


@pytest.mark.parametrize(
    ("file", "fields", "param", "message"),
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
def test_invalid_requests_get_openais_error_body(
    endpoint: SpeechEndpoint, file: bytes | None, fields: dict[str, str], param: str, message: str
) -> None:
    response = endpoint.post(file, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


def test_other_refusals(endpoint: SpeechEndpoint) -> None:
    assert endpoint.post(model="nobody").status_code == 404
    large = endpoint.post(encode_wav(np.zeros(150_000, np.int16), 8000))
    assert (large.status_code, "200,000 bytes" in large.text) == (413, True)
    headers = {"Authorization": f"Bearer {endpoint.secrets['free']}"}
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    torn = httpx.post(endpoint.server.url + PATH, content=b"--x\r\nContent-Disp", headers=headers | kind)
    assert torn.status_code == 400
    assert torn.json()["error"]["type"] == "invalid_request_error"
    two = httpx.post(endpoint.server.url + PATH, files=[("file", ("a.wav", SPEECH["one"]))] * 2, headers=headers)
    assert (two.status_code, "Too many files" in two.text) == (400, True)
    assert httpx.post(endpoint.server.url + PATH, files={"file": SPEECH["one"]}).status_code == 401


def test_audio_counts_for_the_rate_limit(endpoint: SpeechEndpoint) -> None:
    first = endpoint.post(key="few")
    assert first.status_code == 200
    responses = [endpoint.post(key="few").status_code for _ in range(4)]
    assert responses[-1] == 429


def test_the_page_transcribes_a_file(endpoint: SpeechEndpoint, browser_page: Any, tmp_path: Path) -> None:
    page = browser_page
    (tmp_path / "one.wav").write_bytes(SPEECH["one"])
    page.goto(endpoint.server.url)
    page.fill("#key", endpoint.secrets["free"])
    page.press("#key", "Tab")
    page.wait_for_selector("#model option", state="attached")
    page.select_option("#model", "listener")
    assert page.is_checked('input[value="transcription"]')
    page.set_input_files("#file", str(tmp_path / "one.wav"))
    page.click("#send")
    wait_for(lambda: "s of audio" in (page.text_content("article .timing") or ""))
    assert page.text_content("article .output") == endpoint.expected(SPEECH["one"])[0]["text"]
    page.click("article .up")
    page.wait_for_selector('article .up[aria-pressed="true"]')


def test_a_temperature_samples(endpoint: SpeechEndpoint) -> None:  # last: it deploys a second speech model
    unsure = fresh_bundle(endpoint.config, endpoint.bundle.folder.parents[1] / "unsure" / "bundle", scale=1)
    deploy(endpoint.config, {"unsure": unsure.folder})
    sampled, greedy = (
        {endpoint.post(model="unsure", temperature=temperature).json()["text"] for _ in range(8)}
        for temperature in ("1", "0")
    )
    assert len(sampled) > 1
    assert len(greedy) == 1
