"""Peers of a gateway that speak bytes, and guest memory, for the tests of what goes wrong."""

import os
import socket
from pathlib import Path

from sync.gateway.control.client import GatewayClient
from sync.gateway.control.info import GatewayInfo
from tests.sync.gateway.conftest import House

PAGE = 4096


def connect_raw(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(str(path))
    return sock


def has_ended(sock: socket.socket) -> bool:
    try:
        while sock.recv(1 << 16):
            pass
    except ConnectionError:
        pass
    return True


def new_ram(pages: int) -> int:
    number = os.memfd_create("ram")
    os.ftruncate(number, pages * PAGE)
    return number


async def status_of(house: House) -> GatewayInfo:
    async with await GatewayClient.connect(house.control_path) as gateway:
        return await gateway.status()
