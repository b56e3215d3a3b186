"""What is told of a link that is lost and made anew while a migration goes on."""

import contextlib
import time

from ferry.migration.handover_runner import HandoverRunner
from ferry.progress import Reporter, seconds_text
from transport.session.link import SessionEnd
from transport.wire.errors import TransportError


async def tell_link(end: SessionEnd, runner: HandoverRunner, reporter: Reporter) -> None:
    """Tells whenever `end` loses its link, and when the session goes on, until the session ends or
    the migration has failed."""
    known = end.link
    with contextlib.suppress(TransportError):
        while True:
            before, known = known, await end.wait_link(known)
            if known.resumed > before.resumed:
                took_s = time.monotonic() - known.lost_at
                reporter.event(
                    "link",
                    state="resumed",
                    times=known.resumed,
                    lost_s=took_s,
                    text=f"The link works again, after {seconds_text(took_s)}; the migration goes "
                    "on where it was.",
                )
            if runner.first_error is not None:
                return
            if known.lost:
                reporter.event(
                    "link",
                    state="lost",
                    times=known.resumed,
                    reason=known.lost,
                    text=f"The link is lost ({known.lost}); both sides keep what they have and try "
                    "to make it anew.",
                )
