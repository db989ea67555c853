"""Directory queues: a file a job, each claimed by exactly one worker, by one atomic rename.

Where a job's file can be, and what moves it on:

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
    nowhere, done/<worker>/<attempt>-<id>/<name>, failed/<worker>/<attempt>-<id>/<name>

``<id>`` is new at every claim, so no two claims ever share a path: a rename onto it cannot
overwrite, and a worker that comes back late finds its path gone (``ClaimLost``), never its
successor's. The folder is made before the rename, so a SIGKILL before it leaves the job waiting
and an empty folder, and a SIGKILL after it leaves a claimed job of a worker that is silent: that
is what :func:`recover_files` returns. The same holds for every other arrow: each is one system
call, before which the job is where it was, and after which it is where it goes.

Beside the jobs there are, all below ``processing`` and all beginning with a dot:

- ``<worker>/.heartbeat``: touched by every claim and by :func:`touch_worker`. It is there before
  the first job, and whoever recovers reads it after having seen the jobs: a job that was claimed
  by a living worker is never taken for a dead one's. Its age is counted by the clock of the file
  system, asked by touching a file there.
- ``.attempts/<inode>-<mtime>-<name's hash>.<n>``: the n-th attempt of this file is spent. Written
  before a job is returned, so that the number survives under the job's own name; never lowered by
  anybody but the worker that has ended the job.
- ``.returning/<attempt>-<id>/<name>``: only where the file system cannot rename without
  overwriting (NFS; all but Linux and Windows). There a job is moved here, linked to its name in
  ``waiting``, and unlinked. A SIGKILL between the last two leaves two names of one file: the next
  claim of it, and every recovery, removes this one. Before that it is not claimable twice, since
  nothing is claimed from here.
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
