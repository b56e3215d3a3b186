"""What `doctor` says of this host, where something is missing that every test machine has."""

import pytest

from ferry.doctor.host import _kernels
from transport.session import buffers


def test_a_libzmq_that_cannot_be_called_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert [finding.check for finding in _kernels()] == ["C libraries", "kernels"]
    buffers._functions.cache_clear()
    monkeypatch.setattr(buffers, "_PYZMQ", "zmq.backend.of_another_kind")
    (finding,) = _kernels()
    assert finding.check == "C libraries"
    assert "of_another_kind cannot be loaded" in finding.text
    assert "pyzmq>=26" in finding.text
