"""``python -m atomic_claim`` is the command ``atomic-claim``."""

from .cli import main

if __name__ == "__main__":
    main()
