"""A control connection that blocks, with nothing but the standard library behind it."""

import socket
from typing import Self, TypeVar

from sync.gateway.control import requests
from sync.gateway.control.info import GatewayInfo, Upgraded
from sync.gateway.control.requests import Request
from sync.gateway.control.shapes import pack, unpack
from sync.gateway.control.wire import MAX_DESCRIPTORS, ControlDecoder, encode
from sync.gateway.engine.custody import ClientRole
from sync.gateway.errors import GatewayLost, error_for

READ_BYTES = 1 << 16

R = TypeVar("R")


def upgrade(path: str, timeout_s: float) -> Upgraded:
    """Has the gateway at `path` be replaced by what its command starts; raises as the client."""
    with BlockingClient(path, timeout_s, role=None) as gateway:
        return gateway.call(requests.Upgrade())


class BlockingClient:
    """Connects to the gateway at `path` and says hello, unless `role` is None; descriptors of
    answers are dropped.

    Raises OSError (each wait takes at most `timeout_s`), and the error that the gateway answers.
    """

    info: GatewayInfo
    """What it answered to the hello."""

    def __init__(
        self,
        path: str,
        timeout_s: float,
        role: ClientRole | None = ClientRole.OBSERVER,
        session: str = "",
    ) -> None:
        self._decoder = ControlDecoder(MAX_DESCRIPTORS)
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
            if role is not None:
                self.info = self.call(requests.ControlHello(requests.VERSION, role, session))
        except BaseException:
            self._sock.close()
            raise

    def call(self, request: Request[R]) -> R:
        message = pack(request, op=request.op)
        self._sock.sendall(encode(message.fields, message.blob))
        while (reply := self._decoder.next_message()) is None:
            data = self._sock.recv(READ_BYTES)
            if not data:
                raise GatewayLost("the gateway closed the control connection")
            self._decoder.feed(data, [])
        if reply.fields.get("ok") is not True:
            raise error_for(str(reply.fields.get("error")), str(reply.fields.get("message")))
        return unpack(request.reply(), reply, "ok")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sock.close()
