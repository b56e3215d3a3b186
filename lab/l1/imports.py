"""What the commands of a demonstration need in the emulated host: imported, all of it is there."""

import ferry.commands.gateway
import ferry.commands.receive
import ferry.commands.send
import lab.commands.guest
import lab.demo
import sync.gateway.main
import sync.vfio.endpoint
from ferry.migration.kernels import warm_up_all
from lab.l1.inside import take_kernels

__all__ = ["ferry", "lab", "sync"]

take_kernels()
warm_up_all()
