"""The program: python -m legacy_app sends what there is to send."""

import os

from sqlalchemy import create_engine
from sqlalchemy.orm import Session

from .models import Base
from .worker import work


def send(email: str, subject: str) -> None:
    """Stand in for a mail server."""
    print(f"{subject!r} to {email}")


def main() -> None:
    """Work until nothing is left."""
    engine = create_engine(os.environ.get("DATABASE_URL", "sqlite:///legacy_app.db"))
    Base.metadata.create_all(engine)
    with Session(engine) as session:
        print(work(session, send), "sent")


if __name__ == "__main__":
    main()
