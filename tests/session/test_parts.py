"""What the environment decides of how a rank is put together."""

import pytest

from ftkit.collectives.config import Transport
from ftkit.core.errors import UsageError
from ftkit.session.parts import transport_of


def test_the_transport_is_a_users_choice() -> None:
    assert transport_of({}) is Transport.AUTO
    assert transport_of({"FTKIT_TRANSPORT": ""}) is Transport.AUTO
    assert transport_of({"FTKIT_TRANSPORT": "tcp"}) is Transport.TCP
    with pytest.raises(UsageError, match="FTKIT_TRANSPORT is 'udp', and may be one of auto, tcp"):
        transport_of({"FTKIT_TRANSPORT": "udp"})
