"""The VMM's settings: what closes its stream, and that everything is put back, whoever does it."""

from typing import Any

import pytest
import trio

from sync.vmm.driver import Vmm
from sync.vmm.errors import QmpProtocolError, VmmNotReady
from sync.vmm.recover import recover_source
from sync.vmm.settings import CLOSING_CAPABILITIES, MigrationSettings, why_closed
from tests.sync.vmm.conftest import PARAMETERS

THROTTLING: dict[str, Any] = {
    "cpu-throttle-initial": 20,
    "cpu-throttle-increment": 10,
    "max-cpu-throttle": 99,
}


def capabilities(**on: bool) -> list[dict[str, Any]]:
    return [{"capability": name.replace("_", "-"), "state": state} for name, state in on.items()]


@pytest.mark.parametrize("name", CLOSING_CAPABILITIES)
def test_a_capability_that_changes_the_form_closes_the_stream(name: str) -> None:
    assert name in why_closed(capabilities(events=True, **{name.replace("-", "_"): True}), {})
    assert not why_closed(capabilities(**{name.replace("-", "_"): False}), {"tls-creds": ""})


def test_encryption_by_the_vmm_closes_the_stream() -> None:
    assert "tls-creds" in why_closed([], {"tls-creds": "tls0"})


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"capabilities": 1, "parameters": {}}'])
def test_settings_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(QmpProtocolError):
        MigrationSettings.unpack(text)


def test_a_vmm_that_cannot_throttle_says_so() -> None:
    settings = MigrationSettings.of(capabilities(events=True), {"downtime-limit": 300})
    with pytest.raises(VmmNotReady, match="--on-stall"):
        settings.check_throttle()
    MigrationSettings.of(capabilities(auto_converge=False), THROTTLING).check_throttle()


def test_only_a_bandwidth_that_somebody_has_chosen_is_a_bound() -> None:
    assert MigrationSettings.of([], {"max-bandwidth": 128 << 20}).most_bytes_per_s is None
    assert MigrationSettings.of([], {"max-bandwidth": 5}).most_bytes_per_s == 5


def test_a_throttle_sleeps_until_it_is_asked_for_and_all_is_put_back(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.capabilities.append("auto-converge")
        qemu.on_capabilities = {"events"}
        qemu.parameters |= THROTTLING
        async with await Vmm.connect(qemu.path) as vmm:
            settings = await vmm.settings()
            await vmm.start_outgoing("unix:/run/stream", may_throttle=True)
            wanted = qemu.arguments["migrate-set-capabilities"]["capabilities"]
            assert {"capability": "auto-converge", "state": True} in wanted
            sleeping = dict.fromkeys(THROTTLING, 1)
            assert qemu.arguments["migrate-set-parameters"] == {"downtime-limit": 0} | sleeping
            await vmm.throttle(settings)
            assert qemu.arguments["migrate-set-parameters"] == THROTTLING
            await vmm.limit_bandwidth(7)
            await vmm.put_back(settings)
            check_put_back(qemu)

    with_qemu(body)


def check_put_back(qemu: Any) -> None:
    assert qemu.parameters == PARAMETERS | THROTTLING
    assert qemu.on_capabilities == {"events"}


def test_i8_whoever_recovers_the_source_puts_its_settings_back(with_qemu: Any) -> None:
    async def body(qemu: Any) -> None:
        qemu.capabilities.append("auto-converge")
        qemu.on_capabilities = {"events"}
        qemu.parameters |= THROTTLING
        async with await Vmm.connect(qemu.path) as vmm:
            packed = (await vmm.settings()).pack()
            await vmm.start_outgoing("unix:/run/stream", may_throttle=True)
        done = await trio.to_thread.run_sync(recover_source, qemu.path, 5.0, packed)
        assert done == "the guest was running"
        check_put_back(qemu)
        qemu.errors["migrate-set-parameters"] = "not now"
        done = await trio.to_thread.run_sync(recover_source, qemu.path, 5.0, packed)
        assert "its settings are not as before" in done

    with_qemu(body)
