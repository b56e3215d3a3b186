"""Controllers, VMMs and devices that break the protocol are cut off, and nobody else notices."""

import errno
import os
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import fields
from typing import Any, cast

import pytest
import trio

from sync.gateway.control.client import GatewayClient
from sync.gateway.control.requests import REQUESTS, VERSION, ControlHello, Status
from sync.gateway.control.wire import MAX_BLOB_BYTES, ControlMessage, encode
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import GatewayError
from sync.vfio_user.protocol import (
    HEADER,
    Command,
    DmaMap,
    Version,
    encode_message,
)
from tests.sync.gateway.conftest import House, ServedDevice
from tests.sync.gateway.raw_peers import PAGE, connect_raw, has_ended, new_ram, status_of


def test_i9_a_hostile_controller_is_cut_off_and_nobody_else_notices(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    open_fds: Callable[[], int],
    rng: random.Random,
) -> None:
    house = make_house()
    house.serve(make_device())
    vmm = house.vmm()
    vmm.region_read(0, 0, 4)
    before = open_fds()
    attacks = [
        struct.pack("<II", 1 << 31, 0),
        struct.pack("<II", 2, MAX_BLOB_BYTES + 1) + b"{}",
        struct.pack("<II", 4, 0) + b"[1]\n",
        struct.pack("<II", 4, 0) + b"\xff\xfe{}",
        struct.pack("<II", 60000, 0) + b"[" * 60000,
        rng.randbytes(64),
    ]
    for attack in attacks:
        with connect_raw(house.control_path) as sock:
            sock.sendall(attack + bytes(16))
            assert has_ended(sock)
    with connect_raw(house.control_path) as sock:
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", 1))
        sock.sendmsg([encode({"op": "status"})], [rights])
        assert has_ended(sock)
    assert vmm.region_read(0, 0, 4) == bytes(4)
    assert open_fds() == before


def test_i9_nonsense_requests_are_answered_with_an_error(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house = make_house()
    house.serve(make_device())
    house.vmm()
    values: list[Any] = [None, -1, 1 << 70, 1.5, "x" * 4000, [], {}, True, "a\0b"]
    long = "\u00e9" * 10915  # An answer that quotes it has to stay within its own limits.

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            ops: list[Any] = [*REQUESTS, "nonsense", long, 7, None]
            for op in ops:
                names = [field.name for field in fields(cast(Any, REQUESTS.get(op, ControlHello)))]
                for sent in [{}, {long: 0}, *(dict.fromkeys(names, value) for value in values)]:
                    try:
                        message = ControlMessage({"op": op, **sent}, b"junk", [])
                        await gateway._exchange(message, Status())
                    except GatewayError as error:
                        assert error.code not in ("failed", "gateway-lost")
            assert (await gateway.status()).state == "passthrough"

    trio.run(main)


def test_i10_a_controller_that_does_not_read_holds_nobody_up(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(journal_records=256), make_device()
    house.serve(device)
    vmm = house.vmm()
    with connect_raw(house.control_path) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        request = encode({"op": "hello", "version": VERSION, "role": "source"})
        mediate = {"op": "mediate", "tracker": "none", "page_size": 4096, "capture": True}
        sock.sendall(request + encode(mediate) + encode({"op": "status"}) * 500)
        house.wait_event("mediated")
        for value in range(1000):
            vmm.region_write(0, 0, value.to_bytes(4, "little"), posted=True)
        assert vmm.region_read(0, 0, 4) == (999).to_bytes(4, "little")
        info = trio.run(status_of, house)
        assert info.journal_overflow
        assert info.journal_records == 256
    house.wait_event("restored")
    assert vmm.region_read(0, 0, 4) == (999).to_bytes(4, "little")


def test_i9_a_hostile_vmm_is_cut_off_and_the_next_is_served(
    make_house: Callable[..., House], make_device: type[ServedDevice], rng: random.Random
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    house.wait_event("device-connected")
    hello = encode_message(1, Command.VERSION, Version().pack())
    attacks = [
        b"\xff" * 64,
        HEADER.pack(1, Command.VERSION, 8, 0, 0),
        HEADER.pack(1, Command.VERSION, 1 << 30, 0, 0),
        encode_message(1, Command.REGION_READ, bytes(16)),
        encode_message(1, Command.VERSION, b"\0\0\1\0not json\0"),
        encode_message(1, Command.VERSION, b"\7\0\0\0"),
        hello + encode_message(2, Command.DMA_MAP, b"short"),
        hello + hello,
        hello + encode_message(2, Command.DMA_READ, reply=True),
        hello + HEADER.pack(2, Command.REGION_READ, 1 << 30, 0, 0),
        hello + rng.randbytes(256) + b"\xff" * 64,
    ]
    for attack in attacks:
        with connect_raw(house.vmm_path) as sock:
            sock.sendall(attack)
            assert has_ended(sock)
    vmm = house.vmm()
    assert vmm.region_read(0, 0, 4) == bytes(4)
    with connect_raw(house.vmm_path) as sock:
        assert has_ended(sock), "a second VMM is turned away"
    assert vmm.region_read(0, 0, 4) == bytes(4)


def test_i9_a_hostile_device_is_cut_off_and_tried_again(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house = make_house()
    listener = socket.socket(socket.AF_UNIX)
    listener.settimeout(10)
    listener.bind(str(house.device_path))
    listener.listen()
    sock, _ = listener.accept()
    with sock:
        sock.settimeout(10)
        sock.recv(1 << 16)
        sock.sendall(encode_message(4711, Command.VERSION, b"", reply=True))
        assert has_ended(sock)
    house.wait_event("device-unusable")
    listener.close()
    house.device_path.unlink()
    house.serve(make_device())
    assert house.vmm().region_read(0, 0, 4) == bytes(4)


def test_i9_a_gateway_without_descriptors_waits_and_goes_on(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It asks a listener once a tick, as long as nothing can be accepted; and its VMM goes on."""
    house = make_house()
    house.serve(make_device())
    vmm = house.vmm()
    accept, tries, ticks = socket.socket.accept, list[int](), list[float]()
    house.gateway._looks += (ticks.append,)
    none_left = True

    def accept_nothing(sock: socket.socket) -> tuple[socket.socket, Any]:
        if none_left and sock.getsockname() == str(house.control_path):
            tries.append(len(ticks))
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(sock)

    monkeypatch.setattr(socket.socket, "accept", accept_nothing)
    with connect_raw(house.control_path) as sock:
        sock.sendall(encode({"op": "hello", "version": VERSION, "role": "observer"}))
        house.wait_event("cannot-accept", 3)
        assert vmm.region_read(0, 0, 4) == bytes(4)
        none_left = False
        assert sock.recv(1)
    assert len(set(tries)) == len(tries)


def test_i9_malformed_answers_to_a_job_cost_the_job(
    make_house: Callable[..., House], make_device: type[ServedDevice]
) -> None:
    house, device = make_house(), make_device(logging=True)
    house.serve(device)
    vmm = house.vmm()
    ram = new_ram(4)
    vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), ram)
    os.close(ram)

    async def main() -> None:
        async with await GatewayClient.connect(
            house.control_path, role=ClientRole.SOURCE
        ) as gateway:
            feature = device.feature
            device.feature = lambda request: b"?"  # type: ignore[method-assign]
            with pytest.raises(GatewayError):
                await gateway.mediate(tracker="logging", capture=True)
            assert vmm.region_read(0, 0, 4) == bytes(4)
            device.feature = feature  # type: ignore[method-assign]
            mediation = await gateway.mediate(tracker="logging", capture=True)
            os.close(mediation.dirty_fd or 0)
            await gateway.passthrough()

    trio.run(main)
    assert vmm.region_read(0, 0, 4) == bytes(4)


def test_no_descriptor_is_left_behind(
    make_house: Callable[..., House],
    make_device: type[ServedDevice],
    open_fds: Callable[[], int],
    wait_until: Callable[[Callable[[], bool]], None],
) -> None:
    house, device = make_house(), make_device()
    house.serve(device)
    house.wait_event("device-connected")
    before = open_fds()
    ram = new_ram(4)
    for number in range(3):
        vmm = house.vmm()
        vmm.dma_map(DmaMap(3, 0, 0x10000, 4 * PAGE), ram)

        async def main() -> None:
            async with await GatewayClient.connect(
                house.control_path, role=ClientRole.SOURCE
            ) as gateway:
                mediation = await gateway.mediate(tracker="message", capture=True)
                assert mediation.dirty_fd is not None
                os.close(mediation.dirty_fd)
                device.dma.write(0x10000, b"x")
                for region in await gateway.memory():
                    os.close(region.fd)

        trio.run(main)
        house.wait_event("restored", number + 1)
        vmm.close()
        house.wait_event("vmm-lost", number + 1)
        house.wait_event("device-connected", number + 2)
    os.close(ram)
    wait_until(lambda: open_fds() == before)
