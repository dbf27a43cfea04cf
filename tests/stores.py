"""Object stores on loopback, as fixtures: a real S3 server (moto) and a real GCS server (gcp-storage-emulator)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.data import filesystems

SECRET = "not-to-be-printed-0123456789"


class Bucket:
    """A store with one bucket, and its server."""

    def __init__(self, address: str, server: Any = None) -> None:
        self.address, self.server = address, server

    @property
    def filesystem(self) -> Any:
        return filesystems.resolve_address("", self.address)[0]

    def put(self, folder: Path) -> None:
        for file in sorted(file for file in folder.rglob("*") if file.is_file()):
            self.filesystem.pipe(f"{self.address}/in/{file.relative_to(folder)}", file.read_bytes())


def forget() -> None:
    """Forget the clients that were made in another environment."""
    import gcsfs
    import s3fs

    for kind in (s3fs.S3FileSystem, gcsfs.GCSFileSystem):
        kind.clear_instance_cache()


@pytest.fixture(scope="session")
def s3_server() -> Iterator[Any]:
    pytest.importorskip("moto", reason="pip install 'moto[server]'")
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def s3(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    pytest.importorskip("s3fs", reason="pip install 'manta-train[s3]'")
    host, port = s3_server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "someone")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    forget()
    httpx.post(f"http://{host}:{port}/moto-api/reset").raise_for_status()
    bucket = Bucket("s3://corpora", s3_server)
    bucket.filesystem.mkdir("corpora")
    yield bucket
    forget()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="pip install gcp-storage-emulator")
    pytest.importorskip("gcsfs", reason="pip install 'manta-train[gs]'")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="corpora")
    server.start()
    port = server._api._httpd.server_address[1]
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("FSSPEC_GS_TOKEN", "anon")
    forget()
    yield Bucket("gs://corpora", server)
    server.stop()
    forget()
