"""Commands that are forked behave as those that are started."""

from pathlib import Path

import pytest

from lab.l1.forked import Forked
from lab.testbed import Setup, Testbed, TestbedError


def test_a_forked_command_prints_fails_and_dies_as_one_that_is_started(tmp_path: Path) -> None:
    with Testbed(tmp_path / "bed", Setup(start=Forked)) as bed:
        codes = bed.start("codes", "exit-codes")
        assert codes.wait(60) == 0
        assert any(" verification " in str(event["text"]) for event in codes.events)
        wrong = bed.start("wrong", "send", "--no-such-flag")
        assert wrong.wait(60) == 2
        assert "--no-such-flag" in wrong.log.read_text()
        device = bed.start_device(bed.hosts["a"])
        assert device.running
        with pytest.raises(TestbedError, match="does not end"):
            device.wait(0.1)
        device.kill()
        assert not device.running
        assert device.wait(60) == -9
