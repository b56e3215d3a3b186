"""The file of the secret: made for its owner alone, and refused if it is not."""

import os
import socket
import stat
from pathlib import Path

import pytest

from ferry.cli import main
from ferry.errors import ConfigError, Exit, LocalError
from ferry.private import check_private
from ferry.secret_file import Trust, is_of_this_host, read_authorized, read_identity, read_secret
from transport.session.secret import Keys, public_key


def test_the_command_makes_a_secret_that_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = []
    for name in ("one", "two"):
        path = tmp_path / name
        assert main(["secret", "--output", str(path)]) == Exit.OK
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        made.append(read_secret(str(path)))
        said = capsys.readouterr()
        assert path.read_text().strip() not in said.out + said.err
    assert [len(secret or b"") for secret in made] == [32, 32]
    assert made[0] != made[1]


def test_no_file_is_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file"
    path.write_text("mine")
    assert main(["secret", "--output", str(path)]) == Exit.LOCAL
    assert "exists already" in capsys.readouterr().err
    assert path.read_text() == "mine"
    assert main(["secret", "--output", str(tmp_path / "no" / "folder")]) == Exit.LOCAL


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_can_use_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "secret"
    path.write_text("a" * 64)
    path.chmod(mode)
    with pytest.raises(LocalError, match=f"mode {mode:04o}.*chmod 600"):
        read_secret(str(path))


@pytest.mark.parametrize("content", ["", "a" * 63, "a" * 65, "g" * 64, "a" * 300, "\0" * 64])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    path.write_text(content)
    with pytest.raises(ConfigError, match=r"64 hexadecimal digits.*vfio-ferry secret"):
        read_secret(str(path))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    assert read_secret(None) is None
    os.mkfifo(tmp_path / "pipe", 0o600)
    for what in ("/dev/null", str(tmp_path / "pipe")):
        with pytest.raises(LocalError, match="no file"):
            read_secret(what)
    with pytest.raises(OSError, match="No such file"):
        read_secret(str(tmp_path / "none"))


@pytest.mark.parametrize(
    "command",
    [
        ["send", "--gateway", "g", "--qmp", "q", "--to", "tcp://127.0.0.1:1"],
        ["receive", "--gateway", "g", "--qmp", "q", "--listen", "tcp://127.0.0.1:0"],
    ],
    ids=lambda command: command[0],
)
def test_a_bad_file_ends_a_command_before_it_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    path = tmp_path / "secret"
    path.touch(0o600)
    assert main([*command, "--secret", str(path)]) == Exit.USAGE
    assert "hexadecimal" in capsys.readouterr().err
    assert main([*command, "--secret", str(tmp_path / "none")]) == Exit.LOCAL


@pytest.mark.parametrize("command", ["send", "receive"])
def test_a_link_that_cannot_be_is_refused_before_it_begins(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    where = {"send": ["--to", "tcp://127.0.0.1:1"], "receive": ["--listen", "tcp://127.0.0.1:0"]}
    words = [command, "--gateway", "g", "--qmp", "q", *where[command]]
    assert main([*words, "--peer-timeout", "0.1"]) == Exit.USAGE
    assert "a timeout of 0.1 s" in capsys.readouterr().err
    path = str(tmp_path / "secret")
    main(["secret", "--output", path])
    monkeypatch.setattr("zmq.has", lambda _: False)
    assert main([*words, "--secret", path]) == Exit.USAGE
    assert "cannot encrypt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "of_this_host"),
    [
        ("ipc:///run/ferry.sock", True),
        ("tcp://127.0.0.1:1", True),
        ("tcp://127.1.2.3:1", True),
        ("tcp://localhost:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://0.0.0.0:1", False),
        ("tcp://[::]:1", False),
        ("tcp://10.0.0.1:1", False),
        ("tcp://eth0:1", False),
    ],
)
def test_an_address_of_the_network_is_told_from_one_of_this_host(
    url: str, of_this_host: bool
) -> None:
    """What `receive` warns of, without a secret."""
    assert is_of_this_host(url) is of_this_host


@pytest.mark.parametrize("above", [0, 1])
def test_a_file_below_a_folder_that_others_may_write_is_refused(tmp_path: Path, above: int) -> None:
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    assert main(["secret", "--output", str(folder / "secret")]) == Exit.OK
    assert read_secret(str(folder / "secret"))
    open_to_all = (folder, folder.parent)[above]
    open_to_all.chmod(0o777)
    with pytest.raises(LocalError, match=rf"others may write to {open_to_all} \(mode 0777\)"):
        read_secret(str(folder / "secret"))
    open_to_all.chmod(0o1777)  # as /tmp: nobody can replace what is another's there
    assert read_secret(str(folder / "secret"))


def test_what_belongs_to_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "secret"
    assert main(["secret", "--output", str(path)]) == Exit.OK
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(LocalError, match="belongs to another user"):
        read_secret(str(path))


# --- keys of one's own ---


def _identity(folder: Path, host: str) -> str:
    """Makes one; its public key is in `PATH.pub`."""
    path = str(folder / host)
    assert main(["secret", "--identity", path, "--host", host]) == Exit.OK
    return path


def _authorized(folder: Path, *identities: str) -> str:
    path = folder / "authorized"
    path.write_text(
        "# who may come\n\n" + "".join(Path(f"{i}.pub").read_text() for i in identities)
    )
    path.chmod(0o644)
    return str(path)


def test_the_command_makes_a_pair_of_which_one_half_may_be_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "id"
    assert main(["secret", "--identity", str(path)]) == Exit.OK
    said = capsys.readouterr()
    public = Path(f"{path}.pub").read_text()
    assert public in said.out and path.read_text().split()[1] not in said.out + said.err
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    ((key, host),) = read_authorized(f"{path}.pub")
    assert host == socket.gethostname()
    assert key == public_key(read_identity(str(path)))
    assert main(["secret", "--identity", str(path)]) == Exit.LOCAL
    assert Path(f"{path}.pub").read_text() == public
    for words in ([], ["--identity", str(path), "--output", "x"]):
        assert main(["secret", *words]) == Exit.USAGE


def test_each_side_gets_its_own_key_and_those_of_the_list(tmp_path: Path) -> None:
    a, b, c = (_identity(tmp_path, name) for name in ("a", "b.example", "c"))
    both = Trust(identity=a, authorized=_authorized(tmp_path, b, c))
    public = {name: public_key(read_identity(name)) for name in (b, c)}
    assert both.of_receiver("tcp://0.0.0.0:1") == Keys(read_identity(a), (public[b], public[c]))
    assert both.of_sender("tcp://B.Example:1") == Keys(read_identity(a), (public[b],))
    with pytest.raises(ConfigError, match=r"has no key for d: .*as it stands in --to"):
        both.of_sender("tcp://d:1")
    alone = Trust(identity=a, authorized=f"{b}.pub")
    assert alone.of_sender("tcp://d:1") == alone.of_sender("ipc:///run/x")
    doubled = Path(_authorized(tmp_path, b, c))
    doubled.write_text("".join(f"{public[key].hex()} d\n" for key in (b, c)))
    with pytest.raises(ConfigError, match="has several keys for d"):
        both.of_sender("tcp://d:1")


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("", "authorizes nobody"),
        ("# nobody\n", "authorizes nobody"),
        ("\n" + "a" * 64, "line 2: not a public key"),
        ("a" * 63 + " host", "line 1: not a public key"),
        ("a" * 64 + " host more", "line 1: not a public key"),
    ],
)
def test_a_list_that_is_none_is_refused(tmp_path: Path, content: str, why: str) -> None:
    path = tmp_path / "list"
    path.write_text(content)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=why):
        read_authorized(str(path))
    path.chmod(0o666)
    with pytest.raises(LocalError, match="others may write"):
        read_authorized(str(path))


def test_an_identity_is_its_owners_alone_and_no_secret(tmp_path: Path) -> None:
    path = _identity(tmp_path, "a")
    with pytest.raises(ConfigError, match="holds no secret"):
        read_secret(path)
    shared = tmp_path / "secret"
    assert main(["secret", "--output", str(shared)]) == Exit.OK
    with pytest.raises(ConfigError, match="holds no identity"):
        read_identity(str(shared))
    Path(path).chmod(0o640)
    with pytest.raises(LocalError, match="chmod 600"):
        read_identity(path)


@pytest.mark.parametrize(
    ("trust", "why"),
    [
        (Trust(identity="i"), "belong together"),
        (Trust(authorized="l"), "belong together"),
        (Trust(secret="s", identity="i", authorized="l"), "exclude each other"),
        (Trust(insecure=True, identity="i", authorized="l"), "exclude each other"),
    ],
)
def test_words_that_do_not_go_together_are_refused(trust: Trust, why: str) -> None:
    for side in (trust.of_sender, trust.of_receiver):
        with pytest.raises(ConfigError, match=why):
            side("tcp://127.0.0.1:1")


def test_a_folder_of_somebody_else_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, **_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "resolve", lambda path: path)
    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(LocalError, match="run this as the user whose it is"):
        check_private(tmp_path / "control.sock")
