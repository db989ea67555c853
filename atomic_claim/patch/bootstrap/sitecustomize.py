"""Python imports a module of this name whenever it starts: this one loads the patches."""

import os
import sys

try:
    from atomic_claim.patch.start import load_next, start
except ImportError as error:
    sys.stderr.write(
        f"atomic-claim: {sys.executable} cannot import atomic_claim, so nothing is patched: "
        f"{error}; install it there, or activate the environment that has it\n"
    )
    sys.stderr.flush()
    if os.environ.get("ATOMIC_CLAIM_PROCESS") == str(os.getpid()):
        os._exit(2)
else:
    start()
    load_next(os.path.dirname(__file__))  # noqa: PTH120 - pathlib would be one more import
