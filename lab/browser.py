"""A browser without a window, in which a test looks at pages: Chromium of the machine, or Debian's
package of it in the cache folder (`lab.qemu.packages`), where this machine is a Debian.

`python -m lab.browser` makes the latter: some 150 MB to download, once.
"""

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.qemu import packages
from lab.qemu.errors import EnvironmentFailed
from transport.user_cache import default_cache

PROGRAMS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
PACKAGES = ("chromium-headless-shell", "fonts-dejavu-core", "fontconfig-config")
RUN_S = 120.0
_LIBRARIES = "usr/lib/x86_64-linux-gnu"


class NoBrowser(EnvironmentFailed):
    """There is no Chromium on this machine and none in the cache."""


@dataclass(frozen=True, slots=True)
class Browser:
    """A Chromium; `root` is where its package was unpacked, if it was."""

    program: Path
    root: Path | None = None

    def run(self, *arguments: str) -> str:
        """What it prints. Raises `EnvironmentFailed` if it fails."""
        with tempfile.TemporaryDirectory(prefix="vfio-ferry-browser-") as home:
            environment = {**os.environ, "HOME": home}
            if self.root is not None:
                libraries = self.root / _LIBRARIES
                environment |= {
                    "LD_LIBRARY_PATH": f"{libraries}:{libraries}/pulseaudio",
                    "FONTCONFIG_SYSROOT": str(self.root),
                }
            # Its sandbox needs more than a test has; the pages are ours.
            flags = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={home}/data")
            done = subprocess.run(
                [self.program, *flags, *arguments],
                capture_output=True,
                text=True,
                env=environment,
                timeout=RUN_S,
            )
        if done.returncode:
            raise EnvironmentFailed(f"{self.program} failed: {done.stderr[-1000:]}")
        return done.stdout


def find_browser() -> Browser:
    """The browser of the machine, or the one in the cache. Raises `NoBrowser`."""
    for name in PROGRAMS:
        if program := shutil.which(name):
            return Browser(Path(program))
    root = _folder()
    if root.is_dir():
        return Browser(root / "usr/lib/chromium/chromium-headless-shell", root)
    raise NoBrowser("no Chromium in $PATH, and none in the cache: `python -m lab.browser`")


def prepare() -> Browser:
    """`find_browser`, made where there is none. Raises `QemuMissing` where this host's apt has no
    Debian mirror, `EnvironmentFailed`."""
    try:
        return find_browser()
    except NoBrowser:
        folder = _folder()
    packages.require_tools()
    folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(prefix=".browser.", dir=folder.parent) as work:
        recipe = packages.Recipe(_suite(), PACKAGES)
        files = packages.download(recipe, packages.host_mirror(), Path(work, "downloads"), _say)
        root = Path(work, "root")
        packages.unpack(files, root, _say)
        root.rename(folder)
    return find_browser()


def _folder() -> Path:
    return default_cache() / f"chromium-{_suite()}"


def _suite() -> str:
    """The host's own release, whose C library the programs run with."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "unknown")
    except OSError:
        return "unknown"


def _say(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    print(prepare().program)
