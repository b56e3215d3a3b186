"""A source and a target of capture and replay, for the tests of both."""

from types import SimpleNamespace
from typing import Any

from sync.registers.capture import CaptureSource, CaptureTarget
from sync.registers.payload import PayloadKind, decode_json
from sync.registers.profile.layout import Layout

JOURNAL_SEQ = 100


class Pair:
    """A source and a target on model devices, joined by a list of payloads."""

    def __init__(self, model: SimpleNamespace, text: str | None = None) -> None:
        self.model = model
        layout = Layout(model.profile(text or model.PROFILE), model.view())
        self.source_device, self.target_device = model.Device(), model.Device()
        self.source_gateway = model.Gateway(self.source_device)
        self.target_gateway = model.Gateway(self.target_device)
        self.layout = layout
        self.source = CaptureSource(layout, self.source_gateway, {"method": "replay"})
        self.guest = model.Guest(self.source_gateway)
        self.target: CaptureTarget

    async def prepare(self) -> None:
        offered = decode_json(PayloadKind.OFFER, await self.source.offer())
        self.target = CaptureTarget(self.layout, self.target_gateway, offered["constants"])
        await self.target.check()

    async def mediate(self) -> list[bytes]:
        records = await self.source.snapshot()
        values = await self.source_gateway.batch(records)
        self.guest.seq = JOURNAL_SEQ
        return [payload async for payload in self.source.begin(values, JOURNAL_SEQ)]

    async def deliver(self, payloads: Any) -> None:
        if isinstance(payloads, list):
            for payload in payloads:
                await self.target.receive(payload)
        else:
            async for payload in payloads:
                await self.target.receive(payload)

    async def begin(self) -> None:
        await self.prepare()
        await self.deliver(await self.mediate())

    async def switch(self) -> None:
        await self.source.quiesce()
        await self.deliver(self.source.final())

    async def start(self) -> None:
        await self.target_gateway.batch(self.target.start_records())


def driver_only(model: SimpleNamespace, *names: str) -> str:
    """The profile, in which nobody but the driver changes these registers."""
    text: str = model.PROFILE
    for name in names:
        assert f'name = "{name}"\n' in text
        text = text.replace(f'name = "{name}"\n', f'name = "{name}"\ndriver_only = true\n')
    return text
