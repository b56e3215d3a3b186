"""A control socket behind which there is no gateway."""

import socket
import threading
from pathlib import Path

import pytest
import trio

from sync.gateway.control import client
from sync.gateway.control.client import GatewayClient
from sync.gateway.errors import GatewayUnreachable


def test_something_else_that_says_nothing_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "HELLO_DEADLINE_S", 0.01)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "device"))
        silent.listen()
        with pytest.raises(GatewayUnreachable, match="--control"):
            trio.run(GatewayClient.connect, tmp_path / "device")


@pytest.mark.parametrize("says", [b"", b'{"QMP": {"version": {}}}\r\n'])
def test_something_else_that_closes_or_talks_is_no_gateway(tmp_path: Path, says: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "other"))
        other.listen()

        def serve() -> None:
            with other.accept()[0] as client:
                client.sendall(says)

        thread = threading.Thread(target=serve)
        thread.start()
        with pytest.raises(GatewayUnreachable, match="--control"):
            trio.run(GatewayClient.connect, tmp_path / "other")
        thread.join()
