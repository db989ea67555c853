"""The meaning of the columns of the application's table."""

from mailer import Mail

from atomic_claim import JobTable

mails = JobTable(
    Mail, state="status", free="new", claimed="sending", done="sent", order="created_at"
)
