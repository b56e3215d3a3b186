"""Addresses between the hosts: which need a secret, and what is said where nobody answers."""

import socket
from typing import Any

import pytest
import trio
import trio.testing

from ferry.errors import ConfigError, Exit, Unreachable
from ferry.migration import receive_options, send_options
from ferry.migration.endpoints import resolved, why_nobody_answers

NETWORK = "tcp://192.0.2.7:7100"


@pytest.mark.parametrize("url", [NETWORK, "tcp://*:7100", "tcp://0.0.0.0:1", "tcp://[::]:1"])
def test_an_address_of_a_network_needs_a_secret_or_an_open_word(url: str) -> None:
    for insecure in (False, True):
        send = send_options.Options(to=url, qmp="q", insecure=insecure)
        receive = receive_options.Options(listen=url, qmp="q", insecure=insecure)
        if insecure:
            assert send_options.sender_options(send).secret is None
            assert receive_options.receiver_options(receive).secret is None
            continue
        with pytest.raises(ConfigError, match=r"--to.*--secret FILE, or say --insecure"):
            send_options.sender_options(send)
        with pytest.raises(ConfigError, match=r"--listen.*--secret FILE, or say --insecure"):
            receive_options.receiver_options(receive)


@pytest.mark.parametrize(
    "url", ["tcp://127.0.0.1:1", "tcp://localhost:1", "tcp://[::1]:1", "ipc:///run/x"]
)
def test_an_address_of_this_host_does_not(url: str) -> None:
    assert send_options.sender_options(send_options.Options(to=url, qmp="q")).secret is None


def test_a_secret_and_none_cannot_both_be_meant() -> None:
    options = send_options.Options(to=NETWORK, qmp="q", secret="file", insecure=True)
    with pytest.raises(ConfigError, match="exclude each other"):
        send_options.sender_options(options)


def test_a_host_that_is_not_known() -> None:
    with pytest.raises(Unreachable, match=r"there is no host 'no-such-host\.invalid'") as caught:
        trio.run(resolved, "tcp://no-such-host.invalid:7100")
    assert caught.value.exit_code is Exit.UNREACHABLE


def test_names_become_addresses() -> None:
    assert trio.run(resolved, "tcp://127.0.0.1:7100") == "tcp://127.0.0.1:7100"
    assert trio.run(resolved, "tcp://[::1]:7100") == "tcp://[::1]:7100"
    assert trio.run(resolved, "ipc:///run/x") == "ipc:///run/x"


def test_of_several_addresses_the_one_that_answers_is_taken(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The name has an address where nobody listens, and one more."""

    def two(_host: object, port: Any, *_: object, **__: object) -> Any:
        addresses = ("127.0.0.9", "127.0.0.1")
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, (address, int(port or 0))) for address in addresses]

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        monkeypatch.setattr(socket, "getaddrinfo", two)
        assert trio.run(resolved, f"tcp://two:{port}") == f"tcp://127.0.0.1:{port}"


def test_a_port_that_refuses() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    why = trio.run(why_nobody_answers, f"tcp://127.0.0.1:{port}")
    assert why.startswith(f"127.0.0.1 refuses port {port}: nothing listens there")


def test_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: object) -> None:
        await trio.sleep_forever()

    monkeypatch.setattr(trio, "open_tcp_stream", never)
    clock = trio.testing.MockClock(autojump_threshold=0)
    why = trio.run(why_nobody_answers, NETWORK, clock=clock)
    assert why.startswith("192.0.2.7 is silent at port 7100")


def test_somebody_who_answers_needs_another_explanation() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert trio.run(why_nobody_answers, f"tcp://127.0.0.1:{listener.getsockname()[1]}") == ""
