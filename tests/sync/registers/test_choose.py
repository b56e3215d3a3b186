"""The choice of a method and a profile, on both sides."""

import json
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from trio.testing import trio_test

from sync.registers import find
from sync.registers.capture import CaptureSource, CaptureTarget
from sync.registers.choose import source_for, target_for
from sync.registers.errors import (
    IdentityMismatch,
    MethodMismatch,
    NoMethod,
    PayloadError,
    ProfileError,
)
from sync.registers.find import find_profile, load_profiles
from sync.registers.payload import PayloadKind, decode_json, encode_json
from sync.registers.profile.toml import parse_profile
from sync.registers.v2 import StreamSource, StreamTarget


def port(model: SimpleNamespace) -> Any:
    return model.Gateway(model.Device())


def origins(model: SimpleNamespace, text: str | None = None) -> Any:
    return ((model.profile(text or model.PROFILE),),)


@pytest.mark.parametrize(
    ("v2", "method", "expected"),
    [
        (True, "auto", StreamSource),
        (True, "v2", StreamSource),
        (True, "replay", CaptureSource),
        (False, "auto", CaptureSource),
        (False, "replay", CaptureSource),
    ],
)
def test_the_method(model: SimpleNamespace, v2: bool, method: Any, expected: type) -> None:
    source = source_for(model.view(v2=v2), port(model), origins(model), method)
    assert isinstance(source, expected)


def test_v2_is_not_made_up(model: SimpleNamespace) -> None:
    with pytest.raises(NoMethod, match="does not offer VFIO migration v2: use method 'replay'"):
        source_for(model.view(), port(model), origins(model), "v2")


def test_a_device_that_nobody_knows_is_refused_with_a_start_for_its_profile(
    model: SimpleNamespace,
) -> None:
    device = model.view(vendor=0xABCD, device=0x1111)
    with pytest.raises(NoMethod, match="--profile") as caught:
        source_for(device, port(model), load_profiles())
    assert "\n" not in str(caught.value)
    draft = caught.value.draft
    with pytest.raises(ProfileError, match="describe its registers"):
        parse_profile(draft)
    without = draft.replace("draft = true\n", "")
    with pytest.raises(ProfileError, match="register"):
        parse_profile(without)
    edited = without.replace("# [[", "[[").replace("\n#\n", "\n\n")
    edited = "\n".join(
        line.removeprefix("# ") if " = " in line else line for line in edited.splitlines()
    )
    profile = parse_profile(edited)
    assert profile.precision(device) is not None
    assert {register.name for register in profile.registers} == {"command", "doorbell"}


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ({"vendor": 0x144D, "device": 0xA808, "class_code": 0x010802}, "NVMe"),
        ({"vendor": 0x1AF4, "device": 0x1041, "class_code": 0x020000}, "virtio-net"),
        ({"vendor": 0x1AF4, "device": 0x1000}, "virtio-net"),
        ({"vendor": 0x1AF4, "device": 0x1048}, "virtio-scsi"),
        ({"vendor": 0x1AF4, "device": 0x1004}, "virtio-scsi"),
        ({"vendor": 0x1AF4, "device": 0x1050}, "virtio-gpu"),
        ({"vendor": 0x1AF4, "device": 0x105A}, "virtio-fs"),
    ],
)
def test_a_device_whose_state_is_elsewhere_is_refused_by_name_and_offered_no_draft(
    model: SimpleNamespace, kind: dict[str, int], told: str
) -> None:
    device = model.view(**kind)
    with pytest.raises(NoMethod, match=told) as caught:
        source_for(device, port(model), load_profiles())
    assert not caught.value.draft


def test_virtio_is_taken_by_type() -> None:
    """Not by vendor: of all types, only block is known to be carried."""
    matches = [match for origin in load_profiles() for each in origin for match in each.matches]
    of_virtio = [match.device for match in matches if match.vendor == 0x1AF4]
    assert of_virtio == [(0x1042, 0x1042)]


@trio_test
async def test_both_sides_come_to_the_same(model: SimpleNamespace) -> None:
    for v2, source_class, target_class in (
        (True, StreamSource, StreamTarget),
        (False, CaptureSource, CaptureTarget),
    ):
        view = model.view(v2=v2)
        source = source_for(view, port(model), origins(model))
        target = target_for(await source.offer(), view, port(model), origins(model))
        assert (type(source), type(target)) == (source_class, target_class)
        assert source.method == target.method
        await target.check()


@pytest.mark.parametrize("v2", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subsystem": 9}, "subsystem: 0x0002 on the source, 0x0009 on the target"),
        ({"class_code": 1}, "class: 0x010203 on the source, 0x000001 on the target"),
        ({"region_sizes": {0: 0x200, 7: 256}}, "region 0: 0x100 bytes on the source, 0x200 bytes"),
        ({"region_sizes": {0: 0x100, 1: 16, 7: 256}}, "region 1: nothing on the source"),
    ],
)
@trio_test
async def test_another_device_is_refused(
    model: SimpleNamespace, v2: bool, change: dict[str, Any], message: str
) -> None:
    source = source_for(model.view(v2=v2), port(model), origins(model))
    with pytest.raises(IdentityMismatch, match=message):
        target_for(await source.offer(), model.view(v2=v2, **change), port(model), origins(model))


@trio_test
async def test_an_unknown_device_at_the_target_is_refused(model: SimpleNamespace) -> None:
    source = source_for(model.view(), port(model), origins(model))
    offer = await source.offer()
    with pytest.raises(IdentityMismatch, match="vendor"):
        target_for(offer, model.view(vendor=9), port(model), origins(model))
    with pytest.raises(NoMethod, match="no profile"):
        target_for(offer, model.view(), port(model), ())


@trio_test
async def test_other_structures_in_the_same_regions_are_refused(model: SimpleNamespace) -> None:
    source = source_for(model.view(), port(model), origins(model))
    moved = bytearray(model.view().config_space)
    moved[0x48] = 0x10
    with pytest.raises(IdentityMismatch, match="virtio:notify"):
        target_for(
            await source.offer(),
            model.view(config_space=bytes(moved)),
            port(model),
            origins(model),
        )


@trio_test
async def test_another_version_of_the_profile_is_refused(model: SimpleNamespace) -> None:
    source = source_for(model.view(), port(model), origins(model))
    other = model.PROFILE.replace('version = "1"', 'version = "1b"')
    with pytest.raises(MethodMismatch, match="model 1, here it is model 1b, and they differ"):
        target_for(await source.offer(), model.view(), port(model), origins(model, other))


@trio_test
async def test_a_target_without_v2_is_refused(model: SimpleNamespace) -> None:
    source = source_for(model.view(v2=True), port(model), origins(model))
    with pytest.raises(MethodMismatch, match="the target's does not"):
        target_for(await source.offer(), model.view(), port(model), origins(model))


@pytest.mark.parametrize(
    ("damage", "error"),
    [
        ({"method": "magic"}, MethodMismatch),
        ({"method": None}, MethodMismatch),
        ({"device": []}, PayloadError),
        ({"device": {"vendor": 1}}, PayloadError),
        ({"structure": None}, PayloadError),
        ({"profile": "x"}, PayloadError),
        ({"profile": {}}, MethodMismatch),
        ({"constants": {"n_queues": None}}, PayloadError),
    ],
)
@trio_test
async def test_i9_a_damaged_offer_is_refused(
    model: SimpleNamespace, damage: dict[str, Any], error: type[Exception]
) -> None:
    source = source_for(model.view(), port(model), origins(model))
    document = decode_json(PayloadKind.OFFER, await source.offer())
    offer = encode_json(PayloadKind.OFFER, {**document, **damage})
    with pytest.raises(error):
        target_for(offer, model.view(), port(model), origins(model))


def profile_text(name: str, device: str = "[0x5000, 0x5fff]") -> str:
    return (
        f'format = 1\nname = "{name}"\nversion = "1"\n'
        f"[[match]]\nvendor = 0x1234\ndevice = {device}\n"
        '[[register]]\nname = "r"\nbase = "bar0"\nsize = 4\nclass = "snapshot"\n'
    )


def test_the_order_of_preference(
    model: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wide.toml").write_text(profile_text("wide"))
    (tmp_path / "narrow.toml").write_text(profile_text("narrow", "0x5678"))
    (tmp_path / "other.toml").write_text(profile_text("other", "0x5679"))
    (tmp_path / "readme.txt").write_text("not a profile")
    plugins = {"a": profile_text("text"), "b": lambda: model.profile(profile_text("called"))}

    class Point:
        value = "somewhere"

        def __init__(self, name: str) -> None:
            self.name = name

        def load(self) -> Any:
            return plugins[self.name]

    def entry_points(group: str) -> list[Point]:
        assert group == "vfio_ferry.profiles"
        return [Point(name) for name in plugins]

    monkeypatch.setattr(find, "entry_points", entry_points)
    found = load_profiles([tmp_path])
    assert [[profile.name for profile in origin] for origin in found] == [
        ["narrow", "other", "wide"],
        ["text", "called"],
        ["e1000", "virtio-pci"],
    ]
    chosen = find_profile(model.view(), found)
    assert chosen is not None
    assert chosen.name == "narrow"
    plugin = find_profile(model.view(), found[1:])
    assert plugin is not None
    assert plugin.name == "text"
    assert find_profile(model.view(), found[2:]) is None

    plugins["b"] = lambda: 3
    with pytest.raises(ProfileError, match=r"plug-in b \(somewhere\) gives a int"):
        load_profiles()
    plugins["b"] = lambda: 1 / 0
    with pytest.raises(ProfileError, match=r"plug-in b .* fails: ZeroDivisionError"):
        load_profiles()
    plugins["b"] = "format = 3"
    with pytest.raises(ProfileError, match=r"plug-in b .*'format' is 3"):
        load_profiles()


def test_plug_ins_are_looked_up_where_they_are_documented() -> None:
    assert isinstance(
        EntryPoint("x", "json:dumps", find.ENTRY_POINT_GROUP).load(), type(json.dumps)
    )


def test_paths_without_a_profile_are_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match=r"no profile can be read from .*missing"):
        load_profiles([tmp_path / "missing"])
    with pytest.raises(ProfileError, match="there is no profile"):
        load_profiles([tmp_path])
    bad = tmp_path / "bad.toml"
    bad.write_text("format = 1")
    with pytest.raises(ProfileError, match=r"bad\.toml: .*'name' is missing"):
        load_profiles([bad])
    bad.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match=r"bad\.toml"):
        load_profiles([bad])
    bad.write_bytes(b"#" * 300_000)
    with pytest.raises(ProfileError, match="larger than"):
        load_profiles([bad])


def test_our_own_profiles_are_sound() -> None:
    names = [profile.name for profile in load_profiles()[-1]]
    assert names == ["e1000", "virtio-pci"]
