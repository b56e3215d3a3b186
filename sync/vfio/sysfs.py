"""PCI functions of the host as sysfs shows them: drivers, IOMMU groups, binding to vfio-pci.

Owns what is read from and written to sysfs. Source: Linux, Documentation/ABI/testing/sysfs-bus-pci.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from sync.registers.profile.locate import DeviceView
from sync.vfio.errors import DriverInUse, GroupNotViable, NoFunction, NoIommu, VfioError

VFIO_DRIVER = "vfio-pci"
SYSFS = Path("/sys")
_ADDRESS = re.compile(r"(?:[0-9a-f]{4}:)?[0-9a-f]{2}:[0-1][0-9a-f]\.[0-7]", re.IGNORECASE)
_HARMLESS_DRIVERS = frozenset({"pci-stub", "pcieport"})
"""Who may have another function of the group beside VFIO: they do no DMA of their own (the kernel's
rule)."""


def parse_address(text: str) -> str:
    """`0000:01:00.0` for what a user writes; the domain may be left out. Raises `NoFunction`."""
    if not _ADDRESS.fullmatch(text):
        raise NoFunction(f"{text!r} is no address of a PCI function, as 0000:01:00.0 is")
    return (text if text.count(":") == 2 else f"0000:{text}").lower()


def host_functions(sysfs: Path = SYSFS) -> list["PciFunction"]:
    """Every PCI function of the host."""
    folder = sysfs / "bus/pci/devices"
    names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
    return [PciFunction(name, sysfs) for name in names]


@dataclass(frozen=True, slots=True)
class PciFunction:
    """A function at `address`. Raises `NoFunction` if the host has none there."""

    address: str
    sysfs: Path = SYSFS

    def __post_init__(self) -> None:
        if not self._folder.is_dir():
            raise NoFunction(f"there is no PCI function {self.address} on this host")

    @property
    def _folder(self) -> Path:
        return self.sysfs / "bus/pci/devices" / self.address

    @property
    def class_code(self) -> int:
        """24 bits: class, subclass, interface."""
        return int((self._folder / "class").read_text(), 16)

    def view(self) -> DeviceView:
        """The function as the choice of a method looks at it, as far as sysfs tells."""

        def number(name: str) -> int:
            return int((self._folder / name).read_text(), 16)

        return DeviceView(
            number("vendor"),
            number("device"),
            number("subsystem_vendor"),
            number("subsystem_device"),
            self.class_code,
            b"",
            {},
        )

    @property
    def driver(self) -> str | None:
        """The driver that has it."""
        link = self._folder / "driver"
        return link.readlink().name if link.is_symlink() else None

    @property
    def is_vfio(self) -> bool:
        """Whether VFIO has it: vfio-pci, or a driver of the same kind that knows the device, as
        mlx5_vfio_pci does, and may offer its own migration."""
        return (self.driver or "").replace("_", "-").endswith(VFIO_DRIVER)

    @property
    def group(self) -> str:
        """Number of its IOMMU group. Raises `NoIommu`."""
        link = self._folder / "iommu_group"
        if not link.is_symlink():
            raise NoIommu(
                f"{self.address} is behind no IOMMU: switch it on in the firmware (VT-d, AMD-Vi) "
                "and for the kernel (intel_iommu=on), then start the host again"
            )
        return link.readlink().name

    @property
    def character_device(self) -> str | None:
        """Name of its device below /dev/vfio/devices, if the kernel has those."""
        folder = self._folder / "vfio-dev"
        names = sorted(each.name for each in folder.iterdir()) if folder.is_dir() else []
        return names[0] if names else None

    def neighbours(self) -> list["PciFunction"]:
        """The other functions of its IOMMU group."""
        folder = self.sysfs / "kernel/iommu_groups" / self.group / "devices"
        names = sorted(each.name for each in folder.iterdir())
        return [PciFunction(name, self.sysfs) for name in names if name != self.address]

    def require_viable(self) -> None:
        """Raise `GroupNotViable` if the host still uses another function of the group."""
        in_use = [
            f"{each.address} ({each.driver})"
            for each in self.neighbours()
            if not (each.driver is None or each.is_vfio or each.driver in _HARMLESS_DRIVERS)
        ]
        if in_use:
            raise GroupNotViable(
                f"{self.address} shares IOMMU group {self.group} with {', '.join(in_use)}: bind "
                f"these to {VFIO_DRIVER}, too, or put the device into another slot"
            )

    def require_vfio(self) -> None:
        """Raise `DriverInUse` unless VFIO has it."""
        if not self.is_vfio:
            has = f"the driver {self.driver}" if self.driver else "no driver"
            raise DriverInUse(f"{has} has {self.address}, and {VFIO_DRIVER} has to: ask for --bind")

    def bind(self) -> str | None:
        """Give it to vfio-pci, unless a driver of VFIO has it. Returns who had it, for `restore`.
        Raises `VfioError`."""
        before = self.driver
        if not self.is_vfio:
            self._hand_over(VFIO_DRIVER)
        if not self.is_vfio:
            raise VfioError(
                f"{self.address} could not be bound to {VFIO_DRIVER}: modprobe {VFIO_DRIVER}, and "
                "look at the kernel's log"
            )
        return before

    def restore(self, driver: str | None) -> None:
        """Give it back to `driver`, or to none. Raises `VfioError`."""
        if self.driver != driver:
            self._hand_over(driver)

    def _hand_over(self, driver: str | None) -> None:
        if self.driver is not None:
            self._write(self._folder / "driver/unbind", self.address)
        # An override that names one driver keeps all others away; an empty line ends it.
        self._write(self._folder / "driver_override", driver or "\n")
        if driver is not None:
            self._write(self.sysfs / "bus/pci/drivers_probe", self.address)
            if driver != VFIO_DRIVER:
                self._write(self._folder / "driver_override", "\n")

    def _write(self, path: Path, text: str) -> None:
        try:
            path.write_text(text)
        except OSError as error:
            raise VfioError(f"{path}: {error.strerror} (binding needs root)") from error
