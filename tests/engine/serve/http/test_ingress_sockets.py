"""Sockets of several ingresses: each is claimed once, in a folder that only this user can reach."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.serve.http.ingress_sockets import claim_socket, make_private_folder


def test_a_socket_is_claimed_by_one_ingress_until_it_ends(tmp_path: Path) -> None:
    folder = make_private_folder(tmp_path / "sockets")
    sockets = [claim_socket(folder, 1), claim_socket(folder, 1)]
    assert [claimed.number for claimed in sockets] == [0, 1]
    with pytest.raises(RuntimeError, match="all 2 sockets"):
        claim_socket(folder, 1)
    sockets[0].lock.close()
    again = claim_socket(folder, 1)
    assert again.number == 0
    for _ in range(2):
        again.listen().close()
    folder.chmod(0o755)
    with pytest.raises(PermissionError, match="can be reached by others"):
        make_private_folder(folder)
