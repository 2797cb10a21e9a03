"""Names of folders and models that are wrong, said at once: before torch is imported and before anyone asks the Hub."""

import re
from pathlib import Path

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_model_name(name: str | Path, option: str = "--model") -> None:
    """Pass folders, and names that only the Hub can know: OWNER/NAME where there is no folder OWNER.

    Raises:
        FileNotFoundError: there is no such folder.
        NotADirectoryError: it is a file.
    """
    path = Path(name)
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(f"{option} {name} is a file; name the folder that it lies in")
    if not HUB_NAME.fullmatch(str(name)) or path.parent.is_dir():
        raise FileNotFoundError(
            f"{option} {name}: there is no such folder; name a folder, or a model on the Hub as OWNER/NAME"
        )


def folder_below(folder: str | Path, pattern: str) -> Path | None:
    """A folder in `folder` that has a file of the pattern, as a run keeps its result in "final"; None where there is none.

    Of several the last by name. For messages about a folder that has no such file itself.
    """
    return max((file.parent for file in Path(folder).glob(f"*/{pattern}")), default=None)
