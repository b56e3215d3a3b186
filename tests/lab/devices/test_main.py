"""The device process from its start to its end."""

import dataclasses
import json
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from signal import Signals
from typing import Any

import pytest

from lab.children import start_child
from lab.devices.errors import DeviceError
from lab.devices.main import DeviceOptions, build, run
from tests.lab.devices.conftest import Host
from tests.listening import wait_until_listening

DEADLINE_S = 20
CODE = """
import json, sys
from lab.devices.main import DeviceOptions, run
print("numba" in sys.modules, flush=True)
run(DeviceOptions(**json.loads(sys.argv[1])))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    started = []

    def new(**options: Any) -> subprocess.Popen[str]:
        fields = {"socket_path": str(tmp_path / "dev.sock"), **options}
        process = start_child(
            [sys.executable, "-c", CODE, json.dumps(fields)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "False\n"
        return process

    yield new
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_a_device_process_serves_until_it_is_told_to_stop(
    host: Host, tmp_path: Path, start: Callable[..., Any], number: Signals, busy: bool
) -> None:
    process = start(image_path=str(host.image()), serial="process", queues=2, v2=True)
    path = tmp_path / "dev.sock"
    wait_until_listening(path, process)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    if busy:
        driver = host.boot(path)
        assert driver.read(0, 512) == host.image().read_bytes()[:512]
    process.send_signal(number)
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, errors) == (0, "")
    assert not path.exists()


def test_a_missing_image_ends_the_process(host: Host, start: Callable[..., Any]) -> None:
    process = start(image_path="missing.img")
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 1
    assert "DeviceError: cannot open the image missing.img: No such file" in errors


def test_a_socket_that_cannot_be_made(host: Host, tmp_path: Path) -> None:
    options = DeviceOptions(socket_path=tmp_path / "no" / "dev.sock", image_path=host.image())
    with pytest.raises(DeviceError, match="cannot listen"):
        run(options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"logging_page_bytes": 2048},
        {"logging_page_bytes": 6000},
        {"logging_page_bytes": 4 << 20},
        {"workers": 0},
        {"workers": 1000},
        {"serial": "x" * 21},
        {"queues": 0},
        {"image_path": "."},
    ],
)
def test_options_that_make_no_sense(
    host: Host, tmp_path: Path, open_fds: Callable[[], int], wrong: dict[str, int | str]
) -> None:
    fields: dict[str, Any] = {
        "socket_path": tmp_path / "dev.sock",
        "image_path": host.image(),
    } | wrong
    before = open_fds()
    with pytest.raises(DeviceError):
        build(DeviceOptions(**fields))
    assert open_fds() == before


def test_options_cannot_be_changed(host: Host) -> None:
    options = DeviceOptions(socket_path="a", image_path="b")
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.v2 = True  # type: ignore[misc]
