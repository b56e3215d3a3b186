"""What is told of a link that is lost."""

from io import StringIO
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio

from ferry.migration.link_news import tell_link
from ferry.progress import Reporter
from transport.session.link import LinkState
from transport.wire.errors import PeerClosed


@pytest.mark.parametrize("failed", [False, True])
def test_a_link_that_ends_with_the_migration_is_not_said_to_be_made_anew(failed: bool) -> None:
    states = [LinkState(lost="cut", lost_at=1.0)]

    async def wait_link(known: LinkState) -> LinkState:
        await trio.lowlevel.checkpoint()
        if not states:
            raise PeerClosed("over")
        return states.pop()

    output = StringIO()
    end = cast(Any, SimpleNamespace(link=LinkState(), wait_link=wait_link))
    runner = cast(Any, SimpleNamespace(first_error=ValueError() if failed else None))
    trio.run(tell_link, end, runner, Reporter("receive", as_json=False, stream=output))
    assert ("try to make it anew" in output.getvalue()) != failed
