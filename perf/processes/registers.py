"""A trivial device and a gateway: `python -m perf.processes.registers device PATH [EVERY_MIB]`, or
`... gateway VMM DEVICE CONTROL BUSY_POLL_US`.

The device serves one client after the other over vfio-user; its registers read as zeros. Given
EVERY_MIB it logs its DMA: one page in each so many MiB is always dirty, none if it is 0.
"""

import gc
import socket
import sys
from dataclasses import replace
from pathlib import Path

from sync.gateway.engine.loop import GatewayOptions
from sync.gateway.main import run as run_gateway
from sync.registers.profile.toml import parse_profile
from sync.vfio_user.protocol import (
    FLAG_ERROR,
    FLAG_NO_REPLY,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    Capabilities,
    Command,
    DeviceInfo,
    Feature,
    FeatureIndex,
    IrqInfo,
    LoggingReport,
    RegionInfo,
    Version,
    encode_message,
)

MIB_PAGES = 256
LOGGING = (
    FeatureIndex.DMA_LOGGING_START,
    FeatureIndex.DMA_LOGGING_STOP,
    FeatureIndex.DMA_LOGGING_REPORT,
)

PROFILE = """
format = 1
name = "trivial"
version = "1"
match = [{ vendor = 0, device = 0 }]
register = [
    { name = "doorbell", base = "bar0", offset = 0, size = 4, class = "hold" },
    { name = "go", base = "bar0", offset = 16, size = 4, class = "snapshot", hold_bits = 1 },
]
comeback = { left_off = ["go"] }
"""
"""With it the gateway keeps what it needs to go on with another process of the device, as it does
of a device that it knows."""


def serve_device(path: str, every_mib: int | None) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    gc.disable()
    while True:
        client, _ = listener.accept()
        _serve_client(client, every_mib)


def _serve_client(client: socket.socket, every_mib: int | None) -> None:
    waiting = b""
    unpack = HEADER.unpack_from
    while True:
        data = client.recv(1 << 18)
        if not data:
            return
        waiting += data
        position = 0
        replies = b""
        while len(waiting) - position >= HEADER_BYTES:
            message_id, command, size, flags, _ = unpack(waiting, position)
            if len(waiting) - position < size:
                break
            if not flags & FLAG_NO_REPLY:
                body = waiting[position + HEADER_BYTES : position + size]
                replies += _answer(message_id, command, body, every_mib)
            position += size
        waiting = waiting[position:]
        if replies:
            client.sendall(replies)


def _answer(message_id: int, command: int, body: bytes, every_mib: int | None) -> bytes:
    if command == Command.REGION_READ:
        count = int.from_bytes(body[12:16], "little")
        size = HEADER_BYTES + len(body) + count
        return HEADER.pack(message_id, command, size, FLAG_REPLY, 0) + body + bytes(count)
    if command == Command.VERSION:
        answer = Version(capabilities=Capabilities(max_msg_fds=16)).pack()
    elif command == Command.DEVICE_GET_INFO:
        answer = DeviceInfo(3, 9, 5).pack()
    elif command == Command.DEVICE_GET_REGION_INFO:
        answer = RegionInfo(body[8], 3, 4096).pack()
    elif command == Command.DEVICE_GET_IRQ_INFO:
        answer = IrqInfo(body[8], 1, 0).pack()
    elif command == Command.REGION_WRITE:
        answer = body[:16]
    elif command in (Command.DMA_MAP, Command.DMA_UNMAP):
        answer = body if command == Command.DMA_UNMAP else b""
    elif (logged := _logged(command, body, every_mib)) is not None:
        answer = logged
    else:
        flags = FLAG_REPLY | FLAG_ERROR
        return HEADER.pack(message_id, command, HEADER_BYTES, flags, 95)
    return encode_message(message_id, command, answer, reply=True)


def _logged(command: int, body: bytes, every_mib: int | None) -> bytes | None:
    """The answer to a request of DMA logging; None: it is none, or nothing is logged."""
    if command != Command.DEVICE_FEATURE or every_mib is None:
        return None
    request = Feature.unpack(body)
    if request.index not in LOGGING:
        return None
    if request.index != FeatureIndex.DMA_LOGGING_REPORT or request.is_probe:
        return body
    report = LoggingReport.unpack(request.data)
    bits = bytearray(report.bitmap_bytes)
    if every_mib:
        step = every_mib * MIB_PAGES // 8
        bits[::step] = b"\1" * len(range(0, len(bits), step))
    data = replace(report, bitmap=bytes(bits)).pack()
    return Feature.get(request.index, len(data), data).pack()


def main() -> None:
    kind, *arguments = sys.argv[1:]
    if kind == "device":
        serve_device(arguments[0], int(arguments[1]) if arguments[1:] else None)
    else:
        vmm, device, control = (Path(path) for path in arguments[:3])
        origins = ((parse_profile(PROFILE),),)
        busy_poll_s = int(arguments[3]) / 1e6
        run_gateway(GatewayOptions(vmm, device, control, busy_poll_s=busy_poll_s, origins=origins))


if __name__ == "__main__":
    main()
