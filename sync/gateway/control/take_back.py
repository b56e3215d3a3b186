"""Has another gateway of the same VM put its device back, before the VMM is resumed.

Blocking: a gateway calls it from a thread. The deciding gateway has kept the guest, which `proof`
says; the other may have let go of it by then.
"""

import time
from collections.abc import Callable

from sync.gateway.control import requests
from sync.gateway.control.blocking import BlockingClient
from sync.gateway.engine.custody import ClientRole, CustodyState
from sync.gateway.errors import GatewayLost, LeaseHeld

RETRY_S = 0.02
HELD_S = 1.0
"""Who has the lease for so long hangs: the deciding gateway has waited for it already."""


def take_back(
    path: str,
    session: str,
    proof: str,
    deadline_s: float,
    end_holder: Callable[[], None] | None = None,
) -> None:
    """Puts the device of the gateway at `path` back to passthrough. `end_holder` ends the process
    that held both gateways, if it hangs and has this one's lease still.

    A gateway that is gone, or has not ended with this, is none that the guest can be held up for:
    nothing is raised for it. Raises `GatewayError` if it refuses.
    """
    began = time.monotonic()
    deadline = began + deadline_s
    while True:
        left_s = max(RETRY_S, deadline - time.monotonic())
        try:
            with BlockingClient(path, left_s, ClientRole.SOURCE, session) as gateway:
                if gateway.info.state is CustodyState.RELEASED:
                    gateway.call(requests.Reclaim(session, proof))
                if gateway.info.state is not CustodyState.PASSTHROUGH:
                    gateway.call(requests.Passthrough())
        except LeaseHeld:
            # It has not seen yet that the `send` that held both has ended.
            if time.monotonic() > deadline:
                raise
            if end_holder is not None and time.monotonic() > began + HELD_S:
                end_holder()
                end_holder = None
            time.sleep(RETRY_S)
            continue
        except (OSError, GatewayLost):
            pass
        return
