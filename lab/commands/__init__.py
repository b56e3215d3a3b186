"""Sub-commands of `vfio-ferry` that serve the laboratory: its devices, its guest, its demos.

They reach the command line as entry points, so that the product does not know them.
"""

from ferry.cli import Command

DEMO = Command("lab.demo", "migrate a small guest under load on this machine, and report")
DEMO_QEMU = Command("lab.qemu.demo", "the same with a stock Linux guest in a stock QEMU")
DEMO_HARDWARE = Command("lab.l1.demo", "the same on functions of an emulated host, by its VFIO")
DEVICE = Command("lab.commands.device", "serve a virtio-blk device over vfio-user")
NIC = Command("lab.commands.nic", "serve an Intel 8254x network card over vfio-user")
NVME = Command("lab.commands.nvme", "serve an NVMe controller over vfio-user")
GUEST = Command("lab.commands.guest", "run the small guest: a VMM, a driver and a checked workload")
