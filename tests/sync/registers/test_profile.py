"""Profiles: what a TOML file may say, and what the message is when it says something else."""

from contextlib import suppress
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sync.registers.errors import ProfileError, ProfileMismatch
from sync.registers.profile.layout import Layout
from sync.registers.profile.model import Match, RegisterClass, Unlisted
from sync.registers.profile.toml import parse_profile
from sync.registers.snapshot import probe_plan, snapshot_plan

HEAD = 'format = 1\nname = "x"\nversion = "1"\n[[match]]\nvendor = 1\n'
REGISTER = """
[[register]]
name = "{name}"
base = "bar0"
offset = {offset}
size = {size}
class = "{kind}"
{more}
"""


def register(
    name: str, offset: int, kind: str = "snapshot", size: object = 4, more: str = ""
) -> str:
    return REGISTER.format(name=name, offset=offset, kind=kind, size=size, more=more)


BANK = (
    register("sel", 0, size=2)
    + register("n", 2, "constant", 2)
    + '[[bank]]\nname = "b"\nselector = "sel"\ncount = "n"\n'
)


def test_the_format_as_documented_is_read() -> None:
    """The example in the documentation is a profile."""
    import sync.registers.profile.toml as documented

    lines = (documented.__doc__ or "").splitlines()
    start = next(place for place, line in enumerate(lines) if "format = 1" in line)
    text = "\n".join(line.strip() for line in lines[start:])
    text += register("num_queues", 0, "constant", 2) + register("queue_select", 4, size=2)
    text += register("driver_feature", 12)
    text += register("queue_enable", 8, size=2, more='bank = "queues"')
    text += register("queue_notify_off", 10, "constant", 2, more='bank = "queues"')
    for place, name in enumerate(("queue_size", "queue_driver", "queue_device")):
        text += register(name, 24 + 8 * place, size=8, more='bank = "queues"')
    text += register("isr_status", 64, "read-to-clear", 1)
    text += register("device_config", 72, "replay", 4, more="compare = true")
    profile = parse_profile(text)
    assert profile.name == "virtio-pci"
    assert profile.unlisted is Unlisted.REPLAY
    assert profile.matches == (Match(0x1AF4, (0x1042, 0x1042)),)
    assert [step.write or step.bank or step.rest for step in profile.steps] == [
        *["device_status"] * 3,
        "queues",
        True,
    ]
    assert profile.registers[0].hold_bits == 4
    assert profile.registers[0].compare


def test_defaults() -> None:
    profile = parse_profile(
        HEAD
        + register("a", 0, "snapshot", 4)
        + register("b", 4, "read-to-clear", 1)
        + register("c", 8, "replay", 16)
        + register("d", 32, "hold", '"window"')
    )
    a, b, c, d = profile.registers
    assert (a.compare, a.reads, a.access, a.kind) == (True, False, 4, RegisterClass.SNAPSHOT)
    assert (b.compare, b.reads, b.access) == (False, True, 1)
    assert (c.compare, c.access) == (False, 4)
    assert d.size is None
    assert profile.steps == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("=", "not valid TOML"),
        ("format = 2", "'format' is 2, this program reads 1"),
        ("format = true", "'format' is True"),
        (HEAD, r"'register' is missing; it has to be 1 to 4096 tables: \[\[register\]\]"),
        ("register = 3\n" + HEAD, "'register' is 3; it has to be 1 to 4096 tables"),
        (HEAD + "[bank]\nname = 3", "'bank' is {'name': 3}"),
        (HEAD.replace('"x"', '"X y"') + register("a", 0), "'name' is 'X y'; it has to be 1 to 64"),
        (HEAD + register("a", 0) + "[other]\n", "unknown key 'other'; allowed are bank, carries"),
        (HEAD + register("a", 0, more="siz = 4"), r"register\]\] a: unknown key 'siz'; allowed"),
        (HEAD + register("a", 0, "clear"), "'class' is 'clear'; it has to be one of snapshot, re"),
        (HEAD + register("a", -1), "'offset' is -1; it has to be a whole number from 0"),
        (HEAD + register("a", 0, size=0), "'size' is 0"),
        (HEAD + register("a", 0, size='"all"'), "'size' is 'all'; it has to be one of window"),
        (HEAD + register("a", 0, size=6), "'size' has to be a multiple of 'access', 4"),
        (HEAD + register("a", 0, more="access = 3"), "'access' is 3; it has to be 1, 2, 4 or 8"),
        (HEAD + register("a", 0, more="max_size = 4"), "'max_size' goes with size"),
        (HEAD + register("a", 0, size='"window"'), "at most 16384 for a register that is read"),
        (HEAD + register("a", 0).replace("bar0", "bar9"), "'base' is 'bar9'; it has to be a base"),
        (HEAD + register("a", 0, more="reads = 1"), "'reads' is 1; it has to be true or false"),
        (HEAD + register("a", 0) * 2, r"register\]\] a: the name is used twice"),
        (HEAD + register("a", 0, more='bank = "q"'), "there is no bank 'q'"),
        (HEAD + register("a", 0, size=16, more="hold_bits = 1"), "needs a register of one access"),
        (HEAD + register("a", 0, more="hold_bits = 0x100000000"), "wider than the register"),
        (HEAD + register("a", 0, "replay", more="hold_bits = 1"), "goes with class snapshot"),
        (HEAD + register("a", 0, "replay", more="skip = 1"), "'skip' goes with class snapshot"),
        (HEAD + register("a", 0, "replay", more="driver_only = true"), "goes with class snapshot"),
        (HEAD + register("a", 0, more="driver_only = true\nhold_bits = 1"), "without 'hold_bits'"),
        (HEAD + BANK.replace("size = 2", "size = 2\ndriver_only = true", 1), "with a selector nor"),
        (HEAD + BANK + register("a", 4, more='driver_only = true\nbank = "b"')
         + register("o", 8, "constant", 2, 'bank = "b"')
         + '[[kick]]\nbank = "b"\nwhen = { a = 1 }\nbase = "bar0"\noffset = "o"\nsize = 2',
         "nor with the 'when' of a kick"),
        (HEAD + register("a", 0, more='owed = "bits"'), "'owed' goes with class read-to-clear"),
        (HEAD + register("a", 0, "read-to-clear", more="owed = true"), "one of bits, count"),
        (HEAD + register("a", 0, "constant", more="compare = false"), "always compared"),
        (HEAD + register("a", 0, "read-to-clear", more="compare = true"), "cannot be read"),
        (HEAD + register("a", 0, "hold", more="reads = true"), "reads of class hold"),
        (HEAD + BANK.replace('"sel"\ncount', '"s"\ncount'), "there is no register 's'"),
        (HEAD + BANK.replace('"sel"\ncount', '"n"\ncount'), "it has to be snapshot"),
        (HEAD + BANK.replace('count = "n"', 'count = "sel"'), "it has to be constant"),
        (HEAD + BANK.replace('count = "n"', "count = 9\nlimit = 8"), "'count' is over 'limit'"),
        (HEAD + BANK.replace('count = "n"', "count = 0"), "'count' is 0"),
        (HEAD + BANK.replace("size = 2", "size = 1", 1), "the selector has 8 bits; 'limit' of"),
        (HEAD + BANK + register("a", 4, more='bank = "b"') + "[[restore]]\nrest = true",
         "no step writes the bank 'b'"),
        (HEAD + register("a", 0) + "[[restore]]\n", "exactly one of 'write', 'bank' and 'rest'"),
        (HEAD + register("a", 0) + '[[restore]]\nwrite = "b"', "there is no register 'b'"),
        (HEAD + register("a", 0) + '[[restore]]\nwrite = "a"\nvalue = 1', "add rest = true"),
        (HEAD + register("a", 0) + "[[restore]]\nrest = true\nmask = 1", "go with 'write' only"),
        (HEAD + register("a", 0) + '[[restore]]\nwrite = "a"\nvalue = 1\nmask = 1', "exclude"),
        (HEAD + register("a", 0, size=1) + '[[restore]]\nwrite = "a"\nmask = 256', "wider than"),
        (HEAD + register("a", 0) + "[[restore]]\nrest = true\n" * 2, "only once"),
        (HEAD + register("a", 0) + '[[restore]]\nbank = "b"', "there is no bank 'b'"),
        (HEAD + register("a", 0) + '[[restore]]\nwrite = "a"\nwhen = { b = 1 }', "register 'b'"),
        (HEAD + register("a", 0) + '[[restore]]\nwrite = "a"\nwhen = 3', "'when' is 3"),
        (HEAD + register("a", 0) + '[reset]\nregister = "b"\nvalue = 0', "no register 'b'"),
        (HEAD + register("a", 0) + '[[kick]]\nbank = "b"\nbase = "bar0"\noffset = "a"\nsize = 2',
         "there is no bank 'b'"),
        (HEAD + BANK + '[[kick]]\nbank = "b"\nbase = "bar0"\noffset = "n"\nsize = 2',
         "'n' has to be in the bank 'b'"),
        (HEAD + BANK + '[[kick]]\nbank = "b"\nbase = "bar0"\noffset = "n"\nsize = 3',
         "'size' is 3"),
        (HEAD + register("a", 0) + '[[carries]]\nregister = "b"\nbits = [1]', "no register 'b'"),
        (HEAD + register("a", 0, "hold") + '[[carries]]\nregister = "a"\nbits = [1]', "snapshot"),
        (HEAD + register("a", 0) + '[[carries]]\nregister = "a"\nbits = [4096]', "bit numbers"),
        ("draft = true\n" + HEAD + register("a", 0), "this is a draft"),
        (HEAD + "device = [5, 1]\n" + register("a", 0), r"'device' is \[5, 1\]; it has to be a nu"),
        (HEAD + "device = 0x10000\n" + register("a", 0), "from 0 to 0xffff"),
        ("x" * 300_000, "may have"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        parse_profile(text)


@given(st.data())
def test_i9_a_damaged_file_is_refused_or_read(data: st.DataObject) -> None:
    text = HEAD + BANK + register("a", 4, more='bank = "b"')
    at = data.draw(st.integers(0, len(text) - 1))
    with suppress(ProfileError):
        parse_profile(text[:at] + data.draw(st.text(max_size=6)) + text[at + 1 :])


def test_the_digest_changes_with_anything() -> None:
    texts = [
        HEAD + register("a", 0),
        HEAD + register("a", 4),
        HEAD + register("a", 0, more="skip = 1"),
        HEAD.replace('version = "1"', 'version = "2"') + register("a", 0),
        HEAD + "device = 2\n" + register("a", 0),
    ]
    digests = {parse_profile(text).digest() for text in texts}
    assert len(digests) == len(texts)
    assert parse_profile(texts[0]).digest() == parse_profile(texts[0] + "# text\n").digest()


def test_matches(model: SimpleNamespace) -> None:
    device = model.view()
    assert Match(0x1234).fits(device)
    assert Match(0x1234, (0x5678, 0x5678), 1, (0, 9), (0x010200, 0x0102FF)).fits(device)
    for wrong in (
        Match(0x1235),
        Match(0x1234, (0, 0x5677)),
        Match(0x1234, None, 2),
        Match(0x1234, None, None, (3, 9)),
        Match(0x1234, None, None, None, (0, 1)),
    ):
        assert not wrong.fits(device)
    wide, narrow = Match(0x1234, (0, 0xFFFF)), Match(0x1234, (0x5678, 0x5678))
    assert Match(0x1234).precision < wide.precision < narrow.precision
    profile = model.profile()
    assert profile.precision(device) is not None
    assert profile.precision(model.view(vendor=9)) is None


def test_a_device_that_lacks_what_the_profile_needs_is_refused(model: SimpleNamespace) -> None:
    profile = parse_profile(HEAD + register("a", 0))
    with pytest.raises(ProfileMismatch, match=r"'bar0' does not exist, which register 'a' needs"):
        Layout(profile, model.view(region_sizes={7: 256}))
    with pytest.raises(ProfileMismatch, match="is too short"):
        Layout(profile, model.view(region_sizes={0: 2}))
    optional = parse_profile(HEAD + register("a", 0, more="optional = true"))
    assert Layout(optional, model.view(region_sizes={0: 2})).places == []


def test_registers_that_overlap_on_the_device_are_refused(model: SimpleNamespace) -> None:
    with pytest.raises(ProfileMismatch, match="'a' and 'b' overlap"):
        Layout(parse_profile(HEAD + register("a", 0) + register("b", 2)), model.view())


def test_a_bank_beyond_its_limit_is_refused(model: SimpleNamespace) -> None:
    text = HEAD + BANK + register("a", 4, more='bank = "b"')
    layout = Layout(
        parse_profile(text.replace('count = "n"', 'count = "n"\nlimit = 2')), model.view()
    )
    values: dict[tuple[int, int | None], bytes] = {(0, None): b"\0\0", (1, None): b"\3\0"}
    with pytest.raises(ProfileMismatch, match="allows 2 b, the device has 3"):
        snapshot_plan(layout, values)
    values[1, None] = b"\2\0"
    assert len(snapshot_plan(layout, values).records()) // 32 == 2 + 4 + 2
    assert len(probe_plan(layout).records()) // 32 == 2


def test_a_plan_that_would_hold_the_guest_up_is_refused(model: SimpleNamespace) -> None:
    text = HEAD + BANK + register("a", 4, more='bank = "b"\n', size=4096)
    layout = Layout(parse_profile(text), model.view(region_sizes={0: 1 << 16}))
    with pytest.raises(ProfileMismatch, match="65536 are allowed"):
        snapshot_plan(layout, {(0, None): b"\0\0", (1, None): b"\x41\0"})
