"""A wake-up is safe to use from any thread until, while and after it is closed."""

import os
import threading

import pytest

from transport.session.sockets import Wakeup


def test_a_descriptor_is_not_given_back_while_another_thread_writes_to_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wakeup = Wakeup()
    closer = threading.Thread(target=wakeup.close)
    write = os.eventfd_write

    def write_late(fd: int, value: int) -> None:
        closer.start()
        closer.join(0.1)  # time enough to do harm
        assert wakeup.fileno() == fd
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", write_late)
    wakeup.set()
    closer.join()
    assert wakeup.fileno() == -1


def test_once_closed_it_is_neither_set_nor_closed_again() -> None:
    wakeup = Wakeup()
    wakeup.close()
    other = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # takes the number
    wakeup.set()
    wakeup.close()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(other)
    os.close(other)
