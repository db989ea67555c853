"""A Flask application whose loop runs jobs twice."""

from datetime import UTC, datetime

from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()


class Mail(db.Model):
    """A mail to send."""

    id = db.Column(db.Integer, primary_key=True)
    recipient = db.Column(db.String(100), nullable=False)
    status = db.Column(db.String(20), nullable=False, default="new")
    created_at = db.Column(db.DateTime, nullable=False, default=lambda: datetime.now(UTC))


app = Flask(__name__)
app.config.from_prefixed_env()
db.init_app(app)
Migrate(app, db)


def next_mails(limit: int = 10) -> list[Mail]:
    """Find new mails, then mark them: two workers find the same ones."""
    query = db.select(Mail).filter_by(status="new").order_by(Mail.created_at).limit(limit)
    mails = db.session.scalars(query).all()
    for mail in mails:
        mail.status = "sending"
    db.session.commit()
    return mails


@app.cli.command("send")
def send() -> None:
    """Send what there is to send."""
    while mails := next_mails():
        for mail in mails:
            print(f"mail to {mail.recipient}")
            mail.status = "sent"
            db.session.commit()
