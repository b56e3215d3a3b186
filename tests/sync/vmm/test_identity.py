"""What a VMM is, by its own words."""

from typing import Any

import pytest

from sync.vmm.driver import Vmm
from sync.vmm.errors import QmpProtocolError
from sync.vmm.identity import VmmIdentity, identify


def identity(with_qemu: Any, **version: Any) -> VmmIdentity:
    found: list[VmmIdentity] = []

    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            if version:
                vmm.client.version = version
            answer = qemu.query
            qemu.query = lambda name: "pc-q35-11.1-machine" if name == "qom-get" else answer(name)
            found.append(await identify(vmm))

    with_qemu(body)
    return found[0]


def test_a_qemu(with_qemu: Any) -> None:
    qemu = {"major": 11, "minor": 1, "micro": 3}
    found = identity(with_qemu, qemu=qemu, package="Debian 1:11.1.3")
    assert found == VmmIdentity("QEMU", "11.1.3", "pc-q35-11.1")
    assert str(found) == "QEMU 11.1.3 (pc-q35-11.1)"


def test_a_vmm_of_another_kind(with_qemu: Any) -> None:
    found = identity(with_qemu, qemu=dict.fromkeys(("major", "minor", "micro"), 0), package="mine")
    assert (found.name, found.version) == ("mine", "")


def test_a_greeting_without_a_version(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        async with await Vmm.connect(qemu.path) as vmm:
            vmm.client.version = {"package": "x"}
            with pytest.raises(QmpProtocolError, match="version"):
                await identify(vmm)

    with_qemu(body)
