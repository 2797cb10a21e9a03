"""Nothing that exists is overwritten without being asked: said before any work, by every command that writes."""

import os
from collections.abc import Iterable
from pathlib import Path


def refuse_existing(option: str, paths: Iterable[Path], remedy: str = "name another place, or remove it") -> None:
    """FileExistsError if something lies where the command would write; names it, the option and the remedy."""
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        more = f" and {len(existing) - 1} more" if existing[1:] else ""
        raise FileExistsError(f"{option}: {existing[0]}{more} exists; {remedy}")
