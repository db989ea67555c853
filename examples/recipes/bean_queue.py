"""BeanQueue: the query that its callers expect of a dispatch."""

from typing import Any


def tasks(found: list[Any], call: Any) -> Any:
    """Return the query for what was claimed."""
    model = call.self.task_model
    return call.self.session.query(model).filter(model.id.in_([task.id for task in found]))
