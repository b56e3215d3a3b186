"""Debian packages with all they depend on, in a folder of their own.

Uses the host's apt with state, cache and sources of its own: apt resolves the dependencies,
checks the signatures and resumes downloads, with the mirror and the proxy of the host's
configuration; dpkg-deb unpacks. No package is configured and nothing on the host is changed,
so no root, no chroot and no mount is needed. Source: apt.conf(5), sources.list(5).
"""

import os
import re
import stat
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ferry.errors import QemuMissing
from lab.qemu.errors import EnvironmentFailed

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
ARCHITECTURE = "amd64"
UPDATE_DEADLINE_S = 600.0
DOWNLOAD_DEADLINE_S = 3600.0
UNPACK_DEADLINE_S = 600.0
LOCAL_DEADLINE_S = 60.0

_PLANNED = re.compile(r"Inst (\S+) \((\S+) .*\[(\w+)\]\)")

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What goes into a folder. `pinned` are the source packages taken from backports."""

    suite: str
    packages: tuple[str, ...]
    pinned: tuple[str, ...] = ()
    assumed: tuple[str, ...] = ()
    """Virtual packages that count as installed, because their work is done elsewhere."""


def host_mirror() -> str:
    """The Debian mirror of the host's own apt configuration.

    Raises `QemuMissing` when the host has none.
    """
    listing = _run(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(REPO_URI)|$(LABEL)|$(RELEASE)|$(COMPONENT)",
            "Created-By: Packages",
        ],
        LOCAL_DEADLINE_S,
    )
    mirror = choose_mirror(listing, _os_release())
    if mirror is None:
        raise QemuMissing(
            "this host's apt has no Debian mirror to take QEMU from; give one with a mirror "
            "option, or install QEMU 10.1 or later"
        )
    return mirror


def choose_mirror(index_targets: str, os_release: str) -> str | None:
    """The URI of the Debian archive proper in a listing of `URI|label|release|component` lines.

    The label is only known once the host has fetched its lists; without it, on Debian, the line
    of the host's own release is the archive. `os_release` is the text of os-release(5).
    """
    system = dict(
        line.replace('"', "").split("=", 1) for line in os_release.splitlines() if "=" in line
    )
    for line in index_targets.splitlines():
        uri, label, release, component = (line.split("|") + [""] * 4)[:4]
        own = system.get("ID") == "debian" and release == system.get("VERSION_CODENAME")
        if component == "main" and (label == "Debian" or (own and not label.isalpha())):
            return uri
    return None


def require_tools() -> None:
    """Raises `QemuMissing` where apt or dpkg is missing."""
    for tool in ("apt-get", "dpkg-deb"):
        _run([tool, "--version"], LOCAL_DEADLINE_S)


def download(recipe: Recipe, mirror: str, work: Path, progress: Progress) -> list[Path]:
    """Brings `recipe` into `work` and returns the package files. What is there is not fetched
    again.

    Raises `EnvironmentFailed` with apt's own words.
    """
    configuration = _write_configuration(recipe, mirror, work)
    apt = ["apt-get", "-c", str(configuration), "-qq"]
    progress(f"reading the package lists of Debian {recipe.suite}")
    _run([*apt, "update"], UPDATE_DEADLINE_S)
    install = [*apt, "install", "--yes", "--no-install-recommends", *recipe.packages]
    progress(f"downloading {', '.join(recipe.packages)} and what they need")
    _run([*install, "--download-only"], DOWNLOAD_DEADLINE_S)
    plan = _run([*apt, "-q=0", "--simulate", *install[len(apt) :]], LOCAL_DEADLINE_S)
    files = [work / "archives" / name for name in planned_files(plan)]
    missing = [path.name for path in files if not path.exists()]
    if missing or not files:
        raise EnvironmentFailed(f"apt did not download {', '.join(missing) or 'anything'}")
    return files


def planned_files(plan: str) -> list[str]:
    """The names of the package files that `apt-get --simulate install` would install."""
    return [
        f"{match[1]}_{match[2].replace(':', '%3a')}_{match[3]}.deb"
        for match in map(_PLANNED.match, plan.splitlines())
        if match
    ]


def unpack(packages: Sequence[Path], folder: Path, progress: Progress) -> None:
    """Unpacks `packages` into `folder`, laid out with a merged /usr."""
    for name in ("bin", "lib", "lib64", "sbin"):
        (folder / "usr" / name).mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(f"usr/{name}")
    progress(f"unpacking {len(packages)} packages")
    for package in packages:
        # Piped through tar: dpkg-deb itself would put a folder in the place of the links above.
        archive = subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE)
        with archive:
            _run(
                ["tar", "-x", "--keep-directory-symlink", "--no-same-owner", "-C", str(folder)],
                UNPACK_DEADLINE_S,
                stdin=archive.stdout,
            )
        if archive.returncode:
            raise EnvironmentFailed(f"{package} is damaged; delete it and run it again")
    for path in folder.rglob("*"):
        mode = path.lstat().st_mode
        # As root the archives' set-user-ID programs would be just that, in a cache.
        if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
            path.chmod(stat.S_IMODE(mode) & 0o777)


def _write_configuration(recipe: Recipe, mirror: str, work: Path) -> Path:
    for name in ("lists/partial", "archives/partial"):
        (work / name).mkdir(parents=True, exist_ok=True)
    signed_by = f"Signed-By: {KEYRING}\n" if KEYRING.exists() else ""
    (work / "debian.sources").write_text(
        f"Types: deb\nURIs: {mirror}\nSuites: {recipe.suite} {recipe.suite}-backports\n"
        f"Components: main\nArchitectures: {ARCHITECTURE}\n{signed_by}"
    )
    (work / "preferences").write_text(
        "".join(
            f"Package: src:{name}\nPin: release n={recipe.suite}-backports\nPin-Priority: 900\n\n"
            for name in recipe.pinned
        )
    )
    (work / "status").write_text(
        "Package: assumed\nStatus: install ok installed\nArchitecture: all\nVersion: 1\n"
        "Maintainer: none <none@localhost>\nDescription: stands for what is not needed\n"
        f"Provides: {', '.join(recipe.assumed)}\n"
        if recipe.assumed
        else ""
    )
    configuration = work / "apt.conf"
    # Read after the host's own configuration, so that proxies and credentials stay in force; the
    # host's hooks are about the host. apt's download user cannot enter a cache in a home folder.
    configuration.write_text(
        f"""#clear APT::Architectures;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Pre-Install-Pkgs;
APT::Architecture "{ARCHITECTURE}";
APT::Architectures {{ "{ARCHITECTURE}"; }};
APT::Sandbox::User "root";
APT::Update::Error-Mode "any";
Acquire::Retries "3";
Dir::State "{work}";
Dir::State::lists "{work}/lists";
Dir::State::status "{work}/status";
Dir::Cache "{work}";
Dir::Cache::archives "{work}/archives";
Dir::Etc::sourcelist "{work}/debian.sources";
Dir::Etc::sourceparts "/dev/null";
Dir::Etc::preferences "{work}/preferences";
Dir::Etc::preferencesparts "/dev/null";
"""
    )
    return configuration


def _os_release() -> str:
    try:
        return Path("/etc/os-release").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _run(
    arguments: Sequence[str], deadline_s: float, stdin: IO[bytes] | int | None = subprocess.DEVNULL
) -> str:
    try:
        done = subprocess.run(
            arguments,
            stdin=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline_s,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
        )
    except FileNotFoundError as error:
        raise QemuMissing(
            f"{arguments[0]} is not on this machine, so it cannot make itself a QEMU; "
            "install QEMU 10.1 or later"
        ) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EnvironmentFailed(f"{arguments[0]} failed: {error}") from error
    if done.returncode:
        raise EnvironmentFailed(f"{arguments[0]} failed: {done.stderr.strip()[-2000:]}")
    return done.stdout
