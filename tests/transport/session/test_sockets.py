"""Options of connections that libzmq makes."""

import os
import socket

import zmq

from transport.session.sockets import bind, connect, open_dealer, open_router, receive
from transport.session.watch import Watch, do_not_pace


def congestion_control(fd: int) -> bytes:
    with socket.socket(fileno=os.dup(fd)) as copy:
        return copy.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, 16).rstrip(b"\0")


def test_neither_end_of_a_connection_within_the_machine_is_paced() -> None:
    with (
        zmq.Context() as context,
        open_router(context, None) as router,
        open_dealer(context, b"lane", None) as dealer,
    ):
        watches = {router: Watch(router), dealer: Watch(dealer)}
        connect(dealer, bind(router, "tcp://127.0.0.1:*").url)
        dealer.send(b"a frame")
        assert router.poll(10_000)
        router.send_multipart([b"lane", b"an answer"])
        assert dealer.poll(10_000)
        for end, watch in watches.items():
            while not list(watch.events()):
                assert watch.monitor.poll(10_000)
            message = receive(end)
            assert message is not None
            assert congestion_control(watch.given(message[-1:])) == b"reno"
            watch.close()


def test_another_connection_is_as_the_system_has_it() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=("127.0.0.2", 0)) as tcp,
    ):
        before = congestion_control(tcp.fileno())
        do_not_pace(tcp)
        assert congestion_control(tcp.fileno()) == before
    with socket.socket() as unconnected:
        do_not_pace(unconnected)
    one, other = socket.socketpair()
    with one, other:
        do_not_pace(one)
