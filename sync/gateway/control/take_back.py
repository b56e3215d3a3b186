"""Has another gateway of the same VM put its device back, before the VMM is resumed.

Blocking, with nothing but the standard library behind it: a gateway calls it from a thread. The
deciding gateway has kept the guest, which `proof` says; the other may have let go of it by then.
"""

import socket
import time
from typing import TypeVar

from sync.gateway.control import requests
from sync.gateway.control.requests import Request
from sync.gateway.control.shapes import pack, unpack
from sync.gateway.control.wire import MAX_DESCRIPTORS, ControlDecoder, encode
from sync.gateway.engine.custody import ClientRole, CustodyState
from sync.gateway.errors import GatewayLost, LeaseHeld, error_for

RETRY_S = 0.02
READ_BYTES = 1 << 16

R = TypeVar("R")


def take_back(path: str, session: str, proof: str, deadline_s: float) -> None:
    """Puts the device of the gateway at `path` back to passthrough.

    A gateway that is gone, or has not ended with this, is none that the guest can be held up for:
    nothing is raised for it. Raises `GatewayError` if it refuses.
    """
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
                sock.settimeout(max(RETRY_S, deadline - time.monotonic()))
                sock.connect(path)
                _take_back(sock, session, proof)
        except LeaseHeld:
            # It has not seen yet that the `send` that held both has ended.
            time.sleep(RETRY_S)
            continue
        except (OSError, GatewayLost):
            pass
        return


def _take_back(sock: socket.socket, session: str, proof: str) -> None:
    decoder = ControlDecoder(MAX_DESCRIPTORS)
    hello = requests.ControlHello(requests.VERSION, ClientRole.SOURCE, session)
    info = _call(sock, decoder, hello)
    if info.state is CustodyState.RELEASED:
        _call(sock, decoder, requests.Reclaim(session, proof))
    if info.state is not CustodyState.PASSTHROUGH:
        _call(sock, decoder, requests.Passthrough())


def _call(sock: socket.socket, decoder: ControlDecoder, request: Request[R]) -> R:
    message = pack(request, op=request.op)
    sock.sendall(encode(message.fields, message.blob))
    while (reply := decoder.next_message()) is None:
        data = sock.recv(READ_BYTES)
        if not data:
            raise GatewayLost("the gateway closed the control connection")
        decoder.feed(data, [])
    if reply.fields.get("ok") is not True:
        raise error_for(str(reply.fields.get("error")), str(reply.fields.get("message")))
    return unpack(request.reply(), reply, "ok")
