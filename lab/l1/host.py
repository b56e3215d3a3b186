"""One call: start the emulated host, run a program in it, bring back what it printed.

The host has an IOMMU, so that `vfio-pci` serves its functions as on real hardware:

    two NVMe controllers of one namespace, two virtio-blk of one image, two edu,
    two e1000 of one address on a network with a third

Its root file system is the real host's, so the program and its interpreter are where they are here;
what is written there is gone at the end. A folder holds image files, logs and the program's script.
"""

import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from lab.children import start_child
from lab.qemu.cpio import CpioArchive
from lab.qemu.environment import Environment
from lab.qemu.errors import MachineError
from lab.qemu.initramfs import write_initramfs
from lab.qemu.modules import read_module, read_order

MODULES = (
    *("virtio_pci", "9p", "9pnet_virtio", "overlay"),
    *("vfio_pci", "vfio_iommu_type1", "nvme", "virtio_blk", "e1000"),
)
MEMORY_BYTES = 2 << 30
IMAGE_BYTES = 64 << 20
NIC_MAC, PEER_MAC = "52:54:00:12:34:56", "52:54:00:aa:bb:cc"
DEADLINE_S = 300.0
POLL_S = 0.1
_EXIT = "FERRY exit "
_COMMAND_LINE = (
    "console=ttyS0 panic=-1 quiet loglevel=4 intel_iommu=on iommu=pt "
    # What guards a host from its processes costs time, and there is nothing to guard.
    "mitigations=off init_on_alloc=0 no5lvl audit=0 "
    # On a busy machine the kernel's timers and its tests of ciphers fail now and then, and without
    # a cipher it takes no module.
    "no_timer_check cryptomgr.notests nowatchdog"
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a program in the emulated host did."""

    status: int
    """Its exit status."""
    output: str
    """What it printed, to either of its outputs."""
    console: str
    """The emulated host's kernel."""


def run_in_l1(
    environment: Environment,
    folder: Path,
    program: Sequence[str],
    variables: Mapping[str, str],
    deadline_s: float = DEADLINE_S,
    on_line: Callable[[str], None] = lambda line: None,
) -> Outcome:
    """Run `program`, with environment `variables`, as root in a host that is started for it;
    `on_line` is given each line as it is printed there.

    Raises `MachineError` if the host does not come to an end by itself in time.
    """
    script, report, console = folder / "job", folder / "report.log", folder / "console.log"
    settings = [f"export {name}={shlex.quote(value)}" for name, value in variables.items()]
    script.write_text("\n".join([*settings, f"exec {shlex.join(program)}", ""]))
    initramfs = folder / "initramfs.cpio"
    write_initramfs(initramfs, build(environment))
    for name in ("nvme.img", "disk.img"):
        with (folder / name).open("wb") as image:
            image.truncate(IMAGE_BYTES)
    command = [str(environment.qemu.program), *_arguments(environment, folder, initramfs, script)]
    with (folder / "qemu.log").open("wb") as log:
        process = start_child(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
    try:
        _follow(process, report, deadline_s, on_line)
    except subprocess.TimeoutExpired as error:
        raise MachineError(f"L1 is not done after {deadline_s:g} s: {_tail(console)}") from error
    finally:
        process.kill()
        process.wait()
    output, found, status = report.read_text(errors="replace").rpartition(_EXIT)
    if not found:
        raise MachineError(f"L1 ended early: {_tail(folder / 'qemu.log')} {_tail(console)}")
    return Outcome(int(status), output, console.read_text(errors="replace"))


def _follow(
    process: "subprocess.Popen[bytes]",
    report: Path,
    deadline_s: float,
    on_line: Callable[[str], None],
) -> None:
    """Until it has ended. Raises `subprocess.TimeoutExpired`."""
    end = time.monotonic() + deadline_s
    rest = b""
    report.touch()
    with report.open("rb") as log:
        while True:
            ended = process.poll() is not None
            *lines, rest = (rest + log.read()).split(b"\n")
            for line in lines:
                if not line.startswith(_EXIT.encode()):
                    on_line(line.decode(errors="replace"))
            if ended:
                return
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(process.args, deadline_s)
            time.sleep(POLL_S)


def build(environment: Environment) -> bytes:
    """The first file system: busybox, the init script and modules."""
    archive = CpioArchive()
    for name in ("bin", "dev", "proc", "sys"):
        archive.add_folder(name)
    archive.add_character_device("dev/console", 5, 1)
    archive.add_file("bin/busybox", environment.busybox.read_bytes(), 0o755)
    archive.add_file("init", files("lab.l1").joinpath("init.sh").read_bytes(), 0o755)
    order = []
    for path in read_order(environment.modules, MODULES):
        order.append(Path(path).name.split(".ko")[0] + ".ko")
        archive.add_file(f"lib/modules/{order[-1]}", read_module(environment.modules / path))
    archive.add_file("lib/modules/order", "".join(f"{name}\n" for name in order).encode())
    return archive.finish()


def _arguments(environment: Environment, folder: Path, initramfs: Path, script: Path) -> list[str]:
    nvme, disk = folder / "nvme.img", folder / "disk.img"
    return [
        *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
        *("-machine", "q35,kernel-irqchip=split", "-accel", "tcg,thread=multi", "-cpu", "max"),
        *("-smp", "2", "-m", f"{MEMORY_BYTES}B"),
        *("-device", "intel-iommu,intremap=on,caching-mode=on"),
        *("-kernel", str(environment.kernel), "-initrd", str(initramfs)),
        *("-append", f"{_COMMAND_LINE} ferry.job={script}"),
        *("-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap"),
        *("-device", "virtio-9p-pci,fsdev=host,mount_tag=host"),
        # One serial for all controllers of a subsystem.
        *("-device", "nvme-subsys,id=subsystem,nqn=ferry"),
        *("-device", "nvme,id=nvme0,subsys=subsystem,serial=ferry"),
        *("-device", "nvme,id=nvme1,subsys=subsystem,serial=ferry"),
        *("-drive", f"if=none,id=namespace,file={nvme},format=raw"),
        *("-device", "nvme-ns,drive=namespace,nsid=1,shared=on,bus=nvme0"),
        # Below a port a virtio device has a reset of its own; the others can be reset only with the
        # bus that they are alone on.
        *_disk(5, "disk0", disk),
        *_disk(6, "disk1", disk),
        *_behind_a_port(1, "edu"),
        *_behind_a_port(2, "edu"),
        # A NIC and the one that goes on in its place have one address.
        *_network("net0", "net1", "net2"),
        *_behind_a_port(3, f"e1000,netdev=net0,mac={NIC_MAC}"),
        *_behind_a_port(4, f"e1000,netdev=net1,mac={NIC_MAC}"),
        *("-device", f"e1000,netdev=net2,mac={PEER_MAC}"),
        *("-serial", f"file:{folder / 'console.log'}", "-serial", f"file:{folder / 'report.log'}"),
    ]


def _behind_a_port(number: int, device: str) -> list[str]:
    port = f"pcie-root-port,id=port{number},chassis={number}"
    return ["-device", port, "-device", f"{device},bus=port{number}"]


def _network(*names: str) -> list[str]:
    return [word for name in names for word in ("-netdev", f"hubport,id={name},hubid=0")]


def _disk(port: int, name: str, image: Path) -> list[str]:
    drive = f"if=none,id={name},file.filename={image},file.locking=off,format=raw"
    device = f"virtio-blk-pci,drive={name},disable-legacy=on,iommu_platform=on,share-rw=on"
    return ["-drive", drive, *_behind_a_port(port, device)]


def _tail(path: Path) -> str:
    return path.read_text(errors="replace")[-2000:] if path.exists() else ""
