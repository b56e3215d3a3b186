"""What `vfio-ferry tune` makes of its measurements: the settings of `send`, and why.

Owns the decision and the text of the configuration; measures nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ferry.progress import bytes_text
from transport.frames import PAGE_BYTES

ENOUGH = 0.95
"""Of the best rate: if fewer lanes, or else smaller frames, reach it, they are preferred."""
MIN_CACHE_BYTES = 16 << 20
MAX_CACHE_BYTES = 256 << 20
CACHE_SHARE = 1 / 16


@dataclass(frozen=True, slots=True)
class LinkSample:
    """Pages as they are, sent with these settings."""

    lanes: int
    frame_bytes: int
    bytes_per_s: float


@dataclass(frozen=True, slots=True)
class CodecSample:
    """Pages of a sample, encoded by one core."""

    name: str
    page_s: float
    """Seconds for a page."""
    page_bytes: float
    """What a page becomes."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Of `send`, and what is expected of them."""

    lanes: int
    frame_bytes: int
    cache_bytes: int
    link_bytes_per_s: float
    codec: str
    """The one that `auto` should arrive at, with content like the sample."""
    guest_bytes_per_s: float
    """Of such content."""


def choose(
    links: Sequence[LinkSample], codecs: Sequence[CodecSample], cores: int, available_bytes: int
) -> Settings:
    """The settings for this host (`cores`, `available_bytes` of memory) and this link."""
    best = max(sample.bytes_per_s for sample in links)
    link = min(
        (sample for sample in links if sample.bytes_per_s >= ENOUGH * best),
        key=lambda sample: (sample.lanes, sample.frame_bytes),
    )

    def pages_per_s(codec: CodecSample) -> float:
        return min(min(link.lanes, cores) / codec.page_s, link.bytes_per_s / codec.page_bytes)

    codec = max(codecs, key=pages_per_s)
    return Settings(
        lanes=link.lanes,
        frame_bytes=link.frame_bytes,
        cache_bytes=_cache_bytes(available_bytes),
        link_bytes_per_s=link.bytes_per_s,
        codec=codec.name,
        guest_bytes_per_s=pages_per_s(codec) * PAGE_BYTES,
    )


def _cache_bytes(available_bytes: int) -> int:
    """A power of two, so that the number reads well."""
    wanted = max(MIN_CACHE_BYTES, min(MAX_CACHE_BYTES, int(available_bytes * CACHE_SHARE)))
    return 1 << (wanted.bit_length() - 1)


def as_toml(settings: Settings, where: str) -> str:
    """The configuration, for `--config`; `where` says over what link it was measured."""
    link = bytes_text(settings.link_bytes_per_s)
    guest = bytes_text(settings.guest_bytes_per_s)
    return f"""\
# Measured by `vfio-ferry tune` over {where}.
[send]
# Pages as they are: {link}/s. More lanes or larger frames gained less than {1 - ENOUGH:.0%}.
lanes = {settings.lanes}
frame-size = {settings.frame_bytes}
# `auto` adapts to what is sent; for content like the sample it should take {settings.codec},
# for about {guest}/s of guest memory.
codec = "auto"
# What deltas are made from; a share of the memory that was free.
cache = {settings.cache_bytes}
"""
