"""`vfio-ferry demo-hardware`: a guest moves between functions of a host, by the host's own VFIO.

The host is emulated, with an IOMMU and QEMU's own controllers (`lab.l1.host`). In it `vfio-ferry
demo` runs once for each kind of device, with gateways that own functions behind the stock
`vfio-pci`, and prints its report.
"""

import compileall
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import lab
from ferry.config import option
from ferry.errors import LocalError
from ferry.progress import Reporter
from lab.demo import working_folder
from lab.l1.host import run_in_l1
from lab.qemu.environment import prepare
from transport.user_cache import CACHE_VARIABLE, default_cache

KINDS = ("nvme", "virtio")
WITH_LINUX = "nvme-linux"
"""A stock QEMU and a stock Linux in the emulated host: emulation in emulation."""
HOUSE = Path(lab.__file__).parents[1]
ROOMS = ("transport", "sync", "ferry", "lab")
INSIDE = "import sys; from lab.l1.inside import main; sys.exit(main(sys.argv[1:]))"
DEADLINE_S = 1800.0
"""The small guest needs a few minutes on an idle machine of two cores."""
ANY_PROCESSOR = {"NUMBA_CPU_NAME": "generic"}
"""An emulated processor takes minutes to compile what the real one does in seconds."""


@dataclass(frozen=True, kw_only=True)
class Options:
    device: tuple[str, ...] = option(
        "what moves, one after the other (default: what the small guest drives)",
        (),
        repeat=True,
        choices=(*KINDS, WITH_LINUX),
    )
    cache: str | None = option("folder of the QEMU that is made where there is none", None)
    mirror: str | None = option("URI of the Debian archive that it is made from", None)
    folder: str | None = option(
        "keep the emulated host's logs here (default: a temporary one)", None
    )
    json: bool = option("print events as JSON lines", False)


def run(options: Options) -> int:
    reporter = Reporter("demo-hardware", as_json=options.json)

    def say(text: str) -> None:
        reporter.event("message", text=text)

    cache = Path(options.cache).absolute() if options.cache else default_cache()
    environment = prepare(say, cache=cache, mirror=options.mirror)
    compile_ahead(cache)
    say("starting a host with an IOMMU; all that follows happens there, slowly")
    words = [*(options.device or KINDS), *(["--json"] if options.json else [])]
    with working_folder(options.folder) as folder:
        outcome = run_in_l1(
            environment,
            folder.absolute(),
            (sys.executable, "-c", INSIDE, *words),
            variables(cache),
            DEADLINE_S,
            on_line=lambda line: print(line, flush=True),
        )
    return outcome.status


def variables(cache: Path | None = None) -> dict[str, str]:
    """The environment in which the product runs in the emulated host as it does here, with what
    the folder `cache` has."""
    return {
        "PYTHONPATH": str(HOUSE),
        "PATH": os.environ["PATH"],
        "HOME": "/root",
        CACHE_VARIABLE: str(cache or default_cache()),
        **ANY_PROCESSOR,
    }


def compile_ahead(cache: Path | None = None) -> None:
    """Compile what the emulated host needs, kernels into `cache`, unless it is there. Raises
    `LocalError`."""
    for room in ROOMS:
        compileall.compile_dir(HOUSE / room, quiet=2)
    program = "from ferry.migration.kernels import warm_up_all; warm_up_all()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, **variables(cache), "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise LocalError(f"the kernels cannot be compiled: {done.stderr[-500:]}")
