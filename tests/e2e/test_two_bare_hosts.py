"""As a new user would, by docs/operations.md alone: two bare hosts, a migrated guest, and back.

The hosts have a network namespace each, with a cable between them, and a mount namespace each, in
which the other one's folder is empty: they share the disk and nothing else. What the units start is
started by hand, with the words of their ExecStart.
"""

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ferry.errors import Exit
from lab.children import start_child
from lab.testbed import Host, Process, Testbed, Unit
from tests.e2e.two_hosts import MIGRATION_S, OPERATIONS, Method, assert_sound, new_bed, small_setup

pytestmark = [
    pytest.mark.full,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("nsenter"),
        reason="network namespaces need root, ip and nsenter",
    ),
]
ADDRESSES = {"a": "10.83.0.1", "b": "10.83.0.2"}
PORT = 7100
METRICS_PORT = 9310
UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
METHOD = Method("replay", "logging")


def run(*words: object, check: bool = True) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, timeout=60)
    assert not check or done.returncode == 0, (words, done.stderr)
    return done.stdout


class Bare:
    """A host with a network, and a folder that no other host sees."""

    def __init__(self, bed: Testbed, host: Host, other: Host) -> None:
        self.bed, self.host, self.name = bed, host, host.name
        self.etc = host.folder / "etc"
        self.config = self.etc / "vm1.toml"
        namespace = f"ferry-{os.getpid()}-{host.name}"
        run("ip", "netns", "add", namespace)
        self.namespace = namespace
        hide = (
            f"mount -t tmpfs none {shlex.quote(str(other.folder))} && echo ready && exec sleep inf"
        )
        enter = ["ip", "netns", "exec", namespace, "unshare", "-m", "sh", "-c", hide]
        self._holder = start_child(enter, stdout=subprocess.PIPE, text=True)
        assert self._holder.stdout and self._holder.stdout.readline() == "ready\n"
        self.inside = ("nsenter", "-t", str(self._holder.pid), "-m", "-n")
        bed.inside[host.name] = self.inside

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()
        run("ip", "netns", "del", self.namespace, check=False)

    def shell(self, *words: object) -> str:
        return run(*self.inside, *words)

    def ferry(self, *words: object) -> Process:
        """A command of vfio-ferry on this host."""
        return self.bed.start(f"{words[0]} {self.name}", *words)

    def write_config(self, to: str) -> None:
        """Step 4 of the document."""
        qmp, control = self.host.qmp_socket, self.host.control_socket
        self.config.write_text(
            f'[gateway]\ndevice = "{self.host.device_socket}"\n\n'
            f'[receive]\nlisten = "tcp://{ADDRESSES[self.name]}:{PORT}"\nqmp = "{qmp}"\n'
            f'secret = "{self.etc}/secret"\nmetrics-port = {METRICS_PORT}\n\n'
            f'[send]\ngateway = ["{control}"]\nqmp = "{qmp}"\nto = "tcp://{to}:{PORT}"\n'
            f'secret = "{self.etc}/secret"\ncontrol-socket = "{self.host.folder}/send.sock"\n'
        )

    def unit(self, name: str) -> Process:
        """What the unit starts, by hand."""
        text = (UNITS / f"vfio-ferry-{name}@.service").read_text()
        (line,) = (each for each in text.splitlines() if each.startswith("ExecStart="))
        line = line.removeprefix("ExecStart=").replace("/etc/vfio-ferry/%i.toml", str(self.config))
        line = line.replace("/run/vfio-ferry/%i/vmm.sock", str(self.host.gateway_socket))
        line = line.replace("/run/vfio-ferry/%i/control.sock", str(self.host.control_socket))
        line = line.replace("/var/lib/vfio-ferry/%i/records", str(self.host.folder / "records"))
        program, *words = shlex.split(line)
        assert program == "/usr/bin/vfio-ferry" and "%i" not in line
        return self.ferry(*words)

    def start(self, *, incoming: bool) -> None:
        """The device, its gateway by the unit's words, and a guest."""
        unit: Unit = self.host
        self.bed.start_device(unit)
        unit.gateway = self.unit("gateway")
        unit.gateway.wait_socket(unit.control_socket)
        self.bed.start_guest(self.host, incoming=incoming)

    def renew_guest(self) -> None:
        """A VMM anew, which waits for a guest."""
        assert self.host.guest is not None and self.host.gateway is not None
        n_lost = sum(each["event"] == "vmm-lost" for each in self.host.gateway.events)
        self.host.guest.kill()
        deadline = time.monotonic() + MIGRATION_S
        while sum(each["event"] == "vmm-lost" for each in self.host.gateway.events) == n_lost:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        self.bed.start_guest(self.host, incoming=True)

    def scrape(self) -> str:
        code = f"import urllib.request as r; print(r.urlopen('http://127.0.0.1:{METRICS_PORT}/metrics')"
        return self.shell(shutil.which("python3") or "python3", "-c", f"{code}.read().decode())")


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[tuple[Bare, Bare]]:
    setup = small_setup(METHOD, "--high-size", "64M")
    with new_bed(tmp_path, setup) as bed:
        a, b = bed.hosts["a"], bed.hosts["b"]
        hosts: list[Bare] = []
        try:
            hosts += [Bare(bed, a, b)]
            hosts += [Bare(bed, b, a)]
            near, far = hosts
            cable = ("type", "veth", "peer", "name", "eth0", "netns", far.namespace)
            run("ip", "link", "add", "eth0", "netns", near.namespace, *cable)
            for host in hosts:
                address = f"{ADDRESSES[host.name]}/24"
                run("ip", "-n", host.namespace, "addr", "add", address, "dev", "eth0")
                for link in ("eth0", "lo"):
                    run("ip", "-n", host.namespace, "link", "set", link, "up")
                host.etc.mkdir(mode=0o700)
            yield near, far
        finally:
            for process in bed.processes:
                if process.running:
                    process.kill()
            for host in hosts:
                host.close()


def ended(process: Process) -> tuple[int, dict[str, Any]]:
    return process.wait(MIGRATION_S), process.events[-1]


def test_from_two_bare_hosts_to_a_migrated_guest_and_back(
    bare: tuple[Bare, Bare], tmp_path: Path
) -> None:
    a, b = bare
    assert not a.shell("ls", b.host.folder) and not b.shell("ls", a.host.folder)
    # 3: a secret, made on one host and copied to the other.
    assert ended(a.ferry("secret", "--output", a.etc / "secret"))[0] == Exit.OK
    (b.etc / "secret").write_bytes((a.etc / "secret").read_bytes())
    (b.etc / "secret").chmod(0o600)
    # 4 to 6: options, gateways, VMMs.
    a.write_config(ADDRESSES["b"])
    b.write_config(ADDRESSES["a"])
    a.start(incoming=False)
    b.start(incoming=True)
    a.bed.wait_operations(a.host, OPERATIONS)
    # 7: look.
    for host in bare:
        doctor = host.ferry(
            *("doctor", "--qmp", host.host.qmp_socket, "--gateway", host.host.control_socket)
        )
        assert doctor.wait(MIGRATION_S) == Exit.OK, doctor.tail()
    # 8: listen.
    receiver = b.unit("receive")
    receiver.wait_event("listening")
    assert 'vfio_ferry_receive_phase{phase="listening"} 1.0' in b.scrape()
    # A stranger, who has another secret, and one who is not there.
    send = ("send", "--config", a.config, "--json")
    assert ended(a.ferry("secret", "--output", a.etc / "other"))[0] == Exit.OK
    stranger = a.ferry(*send, "--secret", a.etc / "other", "--connect-timeout", "4", "--check")
    code, told = ended(stranger)
    assert code == Exit.UNREACHABLE and "have not got the same secret" in told["message"]
    code, told = ended(a.ferry(*send, "--to", f"tcp://{ADDRESSES['b']}:{PORT + 1}", "--check"))
    assert code == Exit.UNREACHABLE and "refuses port" in told["message"]
    # 9: check, with a forecast.
    check = a.ferry(*send, "--check")
    assert check.wait(MIGRATION_S) == Exit.OK, (check.tail(), receiver.tail())
    assert check.wait_event("forecast")["duration_s"][0] > 0
    # A migration that is cancelled, seen in between.
    slow = a.ferry(*send, "--bandwidth", "2M")
    slow.wait_event("progress")
    control = ("--control-socket", a.host.folder / "send.sock", "--json")
    code, told = ended(a.ferry("status", *control))
    assert code == Exit.OK and told["phase"] == "precopy" and told["settings"]["bandwidth"]
    assert ended(a.ferry("cancel", *control))[0] == Exit.OK
    assert ended(slow)[0] == Exit.INTERRUPTED, slow.tail()
    a.bed.wait_operations(a.host, OPERATIONS)
    # The unit waits for the next VMM at its socket.
    b.renew_guest()
    receiver.wait_event("listening", where=lambda each: each["time"] > told["time"])
    # And then one that is let go faster while it runs.
    moving = a.ferry(*send, "--bandwidth", "2M")
    moving.wait_event("progress")
    code, told = ended(a.ferry("set", *control, "--bandwidth", "none"))
    assert code == Exit.OK, told
    code, told = ended(moving)
    assert code == Exit.OK and told["devices"] == "works", (moving.tail(), receiver.tail())
    arrived = receiver.wait_event("success")
    assert arrived["devices"] == "works"
    assert "vfio_ferry_receive_exit_code 0.0" in b.scrape()
    lines = tmp_path / "vm1.jsonl"
    lines.write_text("".join(json.dumps(event) + "\n" for event in moving.events))
    assert ended(a.ferry("report", lines))[0] == Exit.OK
    assert "The guest runs on 10.83.0.2" in lines.with_suffix(".html").read_text()
    a.bed.wait_operations(b.host, OPERATIONS)
    # 10: the way back, into a VMM anew.
    a.renew_guest()
    home = a.unit("receive")
    home.wait_event("listening")
    back = b.ferry("send", "--config", b.config, "--json")
    assert back.wait(MIGRATION_S) == Exit.OK, (back.tail(), home.tail())
    assert home.wait_event("success")["devices"] == "works"
    assert_sound(a.bed, a.host)
