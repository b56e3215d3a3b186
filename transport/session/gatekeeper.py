"""The thread that libzmq asks whether a peer's key may connect (ZAP, rfc.zeromq.org/spec/27).

Only a sender's may: those of `transport.session.secret.admitted_keys`.
"""

from __future__ import annotations

import zmq

from transport.session.link import LinkThread, Shared
from transport.session.secret import ZAP_DOMAIN, Secret, admitted_keys

_ZAP_ENDPOINT = "inproc://zeromq.zap.01"


class Gatekeeper(LinkThread):
    """Answers libzmq's question for all sockets of a context: may this key connect?"""

    def __init__(
        self, shared: Shared, context: zmq.Context[zmq.Socket[bytes]], secret: Secret
    ) -> None:
        """To be made before a socket is bound that asks it."""
        super().__init__("ferry-gatekeeper", shared)
        self._admitted = admitted_keys(secret)
        self._wakeup = shared.new_wakeup()
        self._socket = context.socket(zmq.REP)
        self._socket.bind(_ZAP_ENDPOINT)

    def run(self) -> None:
        """Answer until the session is over."""
        poller = zmq.Poller()
        poller.register(self._wakeup, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        try:
            while not self.shared.over:
                poller.poll()
                self._wakeup.clear()
                if self._socket.poll(0):
                    self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        finally:
            self._socket.close(linger=0)

    def _answer(self, question: list[bytes]) -> list[bytes]:
        """The answer to libzmq's question, whose parts are version, number, domain, address,
        identity, mechanism and key."""
        version, number, domain, _address, _identity, mechanism, *credentials = question
        known = mechanism == b"CURVE" and domain == ZAP_DOMAIN and len(credentials) == 1
        known = known and credentials[0] in self._admitted
        status = [b"200", b"OK"] if known else [b"400", b"not a sender's key"]
        return [version, number, *status, b"", b""]
