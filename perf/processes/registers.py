"""A trivial device and a gateway: `python -m perf.processes.registers device PATH`, or
`... gateway VMM DEVICE CONTROL BUSY_POLL_US`.

The device serves one client after the other over vfio-user; its registers read as zeros.
"""

import gc
import socket
import sys
from pathlib import Path

from sync.gateway.engine.loop import GatewayOptions
from sync.gateway.main import run as run_gateway
from sync.vfio_user.protocol import (
    FLAG_ERROR,
    FLAG_NO_REPLY,
    FLAG_REPLY,
    HEADER,
    HEADER_BYTES,
    Capabilities,
    Command,
    DeviceInfo,
    IrqInfo,
    RegionInfo,
    Version,
    encode_message,
)


def serve_device(path: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    gc.disable()
    while True:
        client, _ = listener.accept()
        _serve_client(client)


def _serve_client(client: socket.socket) -> None:
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
                replies += _answer(message_id, command, body)
            position += size
        waiting = waiting[position:]
        if replies:
            client.sendall(replies)


def _answer(message_id: int, command: int, body: bytes) -> bytes:
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
    else:
        flags = FLAG_REPLY | FLAG_ERROR
        return HEADER.pack(message_id, command, HEADER_BYTES, flags, 95)
    return encode_message(message_id, command, answer, reply=True)


def main() -> None:
    kind, *arguments = sys.argv[1:]
    if kind == "device":
        serve_device(arguments[0])
    else:
        vmm, device, control = (Path(path) for path in arguments[:3])
        run_gateway(GatewayOptions(vmm, device, control, busy_poll_s=int(arguments[3]) / 1e6))


if __name__ == "__main__":
    main()
