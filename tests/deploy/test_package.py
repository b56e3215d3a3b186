"""What is given to users: an sdist, a wheel made from it, and that wheel in a fresh environment."""

import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
pytest.importorskip("build")


def run(*words: object, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.full
@pytest.mark.timeout(900)
def test_a_wheel_from_the_sdist_works_in_a_fresh_environment(tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "out"
    tree.mkdir()
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=HOUSE)
    for name in files.splitlines():
        if (HOUSE / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            (tree / name).write_bytes((HOUSE / name).read_bytes())
    run(sys.executable, "-m", "build", "--outdir", out, tree, cwd=tmp_path)
    (sdist,), (wheel,) = out.glob("*.tar.gz"), out.glob("*.whl")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for name in ("LICENSE", "deploy/systemd/vfio-ferry-gateway@.service", "docs/operations.md"):
        assert name in names
    with zipfile.ZipFile(wheel) as packed:
        assert "sync/profiles/virtio-pci.toml" in packed.namelist()

    fresh = tmp_path / "fresh"
    venv.create(fresh, with_pip=True)
    run(fresh / "bin/python", "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    program = fresh / "bin/vfio-ferry"
    assert run(program, "--version", cwd=tmp_path).startswith("vfio-ferry ")
    assert "in_doubt" in run(program, "exit-codes", cwd=tmp_path)
    run(program, "secret", "--output", tmp_path / "secret", cwd=tmp_path)
    assert ".SH COMMANDS" in run(program, "man", cwd=tmp_path)
    for command in ("send", "receive", "gateway", "doctor", "device"):
        assert "--config" in run(program, command, "--help", cwd=tmp_path)
