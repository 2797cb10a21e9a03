"""Nothing that exists is overwritten without being asked: said before any work, by every command that writes."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_LOCK = ".lock"  # of the run that writes to a folder; the system frees it when the process ends, however it ends


def refuse_existing(option: str, paths: Iterable[Path], remedy: str = "name another place, or remove it") -> None:
    """FileExistsError if something lies where the command would write; names it, the option and the remedy."""
    existing = [str(path) for path in paths if os.path.lexists(path)]
    if existing:
        more = f" and {len(existing) - 1} more" if existing[1:] else ""
        raise FileExistsError(f"{option}: {existing[0]}{more} exists; {remedy}")


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Keep a folder to one run as long as that lasts; a folder that was made for a run without files goes again.

    Raises:
        FileExistsError: another run writes there.
    """
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise FileExistsError(
            f"another run writes to {folder} at this moment; name another folder, or wait until it has ended"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file; a lock that is left keeps nobody out
            (folder / _LOCK).unlink()
        lock.release()
        if made and not has_files(folder):
            shutil.rmtree(folder)


def has_files(folder: Path) -> bool:
    """Whether something lies in a folder besides the lock of a run."""
    return folder.is_dir() and any(path.name != _LOCK for path in folder.iterdir())
