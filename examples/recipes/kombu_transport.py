"""kombu's SQLAlchemy transport: `Channel._get` locks the head of the queue, and all others wait.

Every channel has its own mapped class, so the table is read from the call.
"""

from functools import lru_cache
from queue import Empty
from typing import Any

from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import loads

from atomic_claim import JobTable, Patch, patch_claims


@lru_cache
def messages(message_class: type[Any]) -> JobTable:
    """Declare that a message is free while it is visible."""
    return JobTable(
        message_class, state="visible", free=True, claimed=False, order=["timestamp", "id"]
    )


def patch() -> Patch:
    """One message at a time, past those that others hold."""
    return patch_claims(
        "kombu.transport.sqlalchemy:Channel._get",
        lambda call: messages(call.self.message_cls),
        session="self.session",
        where=lambda call: {"queue_id": call.self._get_or_create(call.queue).id},
        returns=lambda message: loads(bytes_to_str(message.payload)),
        empty=Empty,
        commit=True,
    )
