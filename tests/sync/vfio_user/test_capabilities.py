"""VERSION: what its JSON may hold, and what a session agrees on."""

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.vfio_user.protocol import Capabilities, ProtocolError, TwinSocket, Version


def version(content: Any) -> bytes:
    return struct.pack("<HH", 0, 1) + json.dumps(content).encode() + b"\0"


def test_what_qemu_sends() -> None:
    body = version(
        {
            "capabilities": {
                "max_msg_fds": 16,
                "max_data_xfer_size": 1048576,
                "max_dma_maps": 65535,
                "pgsizes": 4096,
                "migration": {"pgsize": 4096, "max_bitmap_size": 16777216},
                "write_multiple": True,
            }
        }
    )
    assert Version.unpack(body).capabilities == Capabilities(16, write_multiple=True)


@pytest.mark.parametrize("body", [b"", b"{}\0", b'{"capabilities": {}}\0', b'{"other": [1]}\0'])
def test_everything_is_optional(body: bytes) -> None:
    found = Version.unpack(struct.pack("<HH", 0, 0) + body)
    assert found == Version(0, 0, Capabilities())
    assert found.capabilities.max_msg_fds == 1
    assert found.capabilities.max_data_xfer_size == 1 << 20
    assert found.capabilities.max_dma_maps == 65535
    assert found.capabilities.pgsizes == 4096
    assert not found.capabilities.has_twin_socket


@pytest.mark.parametrize(
    "data",
    [
        b"{}",
        b"\0",
        b"{}\0{}\0",
        b"\xff\xfe\0",
        b"[]\0",
        b"{\0",
        b"[" * 16000 + b"\0",
        b'{"a": ' * 2600 + b"\0",
        b'{"capabilities": 1}\0',
        b'{"capabilities": {"max_msg_fds": ' + b"9" * 5000 + b"}}\0",
        b'{"x": "' + b"x" * 20000 + b'"}\0',
    ],
)
def test_i9_version_data_that_is_none(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        Version.unpack(struct.pack("<HH", 0, 0) + data)


@pytest.mark.parametrize(
    "members",
    [
        {"max_msg_fds": -1},
        {"max_msg_fds": True},
        {"max_msg_fds": "16"},
        {"max_data_xfer_size": 0},
        {"max_data_xfer_size": 1.5},
        {"max_dma_maps": 1 << 64},
        {"pgsizes": 0},
        {"pgsizes": None},
        {"write_multiple": 1},
        {"twin_socket": True},
        {"twin_socket": {"supported": "yes"}},
        {"twin_socket": {"supported": True, "fd_index": -1}},
    ],
)
def test_members_of_the_wrong_kind(members: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        Version.unpack(version({"capabilities": members}))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["capabilities", "max_msg_fds", "pgsizes", "twin_socket", "supported"])
            | st.text(max_size=4),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(json_values)
def test_i9_any_json_is_capabilities_or_a_protocol_error(content: Any) -> None:
    try:
        found = Version.unpack(version(content))
    except ProtocolError:
        return
    assert Version.unpack(found.pack()) == found


numbers = st.integers(1, 1 << 40)
capabilities = st.builds(
    Capabilities,
    st.integers(0, 300),
    numbers,
    numbers,
    numbers.map(lambda size: size | 4096),
    st.none() | st.builds(TwinSocket, st.booleans()),
    st.booleans(),
)


@given(capabilities, capabilities)
def test_a_server_agrees_to_no_more_than_either_side_can(
    server: Capabilities, client: Capabilities
) -> None:
    agreed = server.accept(client)
    for name in ("max_data_xfer_size", "max_dma_maps"):
        assert getattr(agreed, name) == min(getattr(server, name), getattr(client, name))
    assert agreed.pgsizes & ~server.pgsizes == agreed.pgsizes & ~client.pgsizes == 0
    assert agreed.write_multiple == (server.write_multiple and client.write_multiple)
    assert agreed.has_twin_socket == (server.has_twin_socket and client.has_twin_socket)
    assert agreed.max_msg_fds == server.max_msg_fds


def test_no_page_size_in_common() -> None:
    with pytest.raises(ProtocolError):
        Capabilities(pgsizes=4096).accept(Capabilities(pgsizes=65536))
