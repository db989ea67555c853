"""The README and the guides of the examples, as the tests read them."""

import re
from pathlib import Path
from typing import Final

REPOSITORY: Final = Path(__file__).parent.parent
# Each text by its topic, the name of its folder; the index and the front page have names of ours.
PATHS: Final = {
    "README": REPOSITORY / "README.md",
    "index": REPOSITORY / "examples" / "README.md",
} | {path.parent.name: path for path in sorted(REPOSITORY.glob("examples/*/README.md"))}
GUIDES: Final = {topic: path.read_text(encoding="utf-8") for topic, path in PATHS.items()}


def blocks(topic: str, language: str) -> list[str]:
    """Return the code blocks of one language in a guide, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", GUIDES[topic], re.DOTALL | re.MULTILINE)
