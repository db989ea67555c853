"""kombu's SQLAlchemy transport: which queue is asked for, and what its channel expects."""

from typing import Any

from kombu.utils.json import loads


def queue(call: Any) -> dict[str, Any]:
    """Return the condition on the queue."""
    return {"queue_id": call.self._get_or_create(call.queue).id}


def body(message: Any) -> Any:
    """Return what was published."""
    return loads(message.payload)
