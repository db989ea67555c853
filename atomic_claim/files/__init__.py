"""Directory queues: one file per job, each claimed by exactly one worker, by one atomic rename.

The places of a job's file, and the calls that move it:

.. code-block:: text

    waiting/.put-<id>                              half-written, never claimed
        │ put_file: one rename that never overwrites
        ▼
    waiting/<name>                                 waits
        │ claim_files: one rename                   ▲ release_files, recover_files: one rename
        ▼                                           │ that never overwrites
    processing/<worker>/<attempt>-<id>/<name>      claimed, as long as it is there
        │ complete_files: one unlink, or one rename
        │ fail_files: one rename
        ▼
    removed, or done/<name>, or failed/<name> beside failed/<name>.reason

``<id>`` is 16 hexadecimal digits that stand for the name and 16 random ones. A claim thus has a
path of its own: a rename onto it cannot overwrite, and a worker that comes back late finds its
path gone (``ClaimLost``). In its folder only the file of that name is a job; whatever else the job
writes there is never returned, nor counted as one.

Each arrow is one system call: before it the job is where it was, after it the job is where it
goes. A SIGKILL before the claim's rename leaves an empty folder. One after it leaves a claimed job
of a worker without a sign of life, which :func:`recover_files` returns.

In ``done`` and ``failed`` a name that exists already is left as it is: the next job of that name is
``<name>.<attempt>-<id>``, and its reason ``<name>.<attempt>-<id>.reason``. Names that would exceed
255 bytes are cut and end in ``~`` and 16 hexadecimal digits, before any of these endings.

Other entries of ``processing``; each begins with a dot:

- ``<worker>/.heartbeat``: touched by every claim and by :func:`touch_worker`. It exists before the
  worker's first job, and a recovery reads it after it has listed the jobs: a job that a living
  worker has claimed is never taken from it. Its age is counted by the clock of the file system.
- ``.attempts/<id of the name>``: the number of attempts that a waiting job has spent. It is written
  before the job waits; the next claim moves the number into its path. It is kept by name: a job
  may rewrite its file. Two jobs that use one name at the same time may exchange their numbers.
  The folder exists from the first claim on, which tells ``processing`` from ``waiting``.
- ``.recovered/<attempt>-<id>/``: the folder of a claim that was taken from a dead worker. The
  job is returned from here, so that a late worker cannot write it again. Other files that the job
  has written stay here.

Nothing is returned where no rename is known not to overwrite (NFS; systems other than Linux, macOS
and Windows): a link and an unlink in its place would leave, after a SIGKILL between the two, a job
that two workers can have.
"""

from .claim import claim_files
from .claimed import ClaimedFile
from .ends import complete_files, fail_files, release_files
from .put import put_file
from .recovery import recover_files
from .workers import touch_worker

__all__ = [
    "ClaimedFile",
    "claim_files",
    "complete_files",
    "fail_files",
    "put_file",
    "recover_files",
    "release_files",
    "touch_worker",
]
