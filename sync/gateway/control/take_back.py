"""Has another gateway of the same VM put its device back, before the VMM is resumed.

Blocking: a gateway calls it from a thread. The deciding gateway has kept the guest, which `proof`
says; the other may have let go of it by then.
"""

import time

from sync.gateway.control import requests
from sync.gateway.control.blocking import BlockingClient
from sync.gateway.engine.custody import ClientRole, CustodyState
from sync.gateway.errors import GatewayLost, LeaseHeld

RETRY_S = 0.02


def take_back(path: str, session: str, proof: str, deadline_s: float) -> None:
    """Puts the device of the gateway at `path` back to passthrough.

    A gateway that is gone, or has not ended with this, is none that the guest can be held up for:
    nothing is raised for it. Raises `GatewayError` if it refuses.
    """
    deadline = time.monotonic() + deadline_s
    while time.monotonic() < deadline:
        left_s = max(RETRY_S, deadline - time.monotonic())
        try:
            with BlockingClient(path, left_s, ClientRole.SOURCE, session) as gateway:
                if gateway.info.state is CustodyState.RELEASED:
                    gateway.call(requests.Reclaim(session, proof))
                if gateway.info.state is not CustodyState.PASSTHROUGH:
                    gateway.call(requests.Passthrough())
        except LeaseHeld:
            # It has not seen yet that the `send` that held both has ended.
            time.sleep(RETRY_S)
            continue
        except (OSError, GatewayLost):
            pass
        return
