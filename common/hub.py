"""Asks the Hub once before anything is downloaded, so that a machine without a network hears of it at once."""

from pathlib import Path

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError

from common.names import HUB_NAME, check_model_name


def check_hub(name: str | Path, file: str = "config.json") -> None:
    """Without a connection, work with what is in the cache; huggingface_hub would try each file six times first.

    Args:
        name: a folder, for which nothing happens, or OWNER/NAME on the Hub.
        file: one that the repository has.

    Raises:
        OSError: there is no connection, and the cache has no such model.
    """
    name = str(name)
    if Path(name).is_dir() or constants.is_offline_mode() or not HUB_NAME.fullmatch(name):
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, file))
    except (HfHubHTTPError, ValueError):
        return  # the Hub answered; what it said is told by the download
    except Exception as error:  # of the HTTP library, whose classes are no part of huggingface_hub's interface
        constants.HF_HUB_OFFLINE = True
        if not isinstance(try_to_load_from_cache(name, file), str):
            raise OSError(
                f"{name} is not in the cache, and {constants.ENDPOINT} does not answer ({error}); connect to a network, or "
                "name a folder"
            ) from error


def local_folder(name: str) -> Path:
    """The folder of a model; one that is named as on the Hub is fetched.

    Raises:
        OSError: there is none, or no connection.
    """
    check_model_name(name)
    check_hub(name)
    if Path(name).is_dir():
        return Path(name)
    try:
        return Path(snapshot_download(name))
    except Exception as error:  # the library's are of many types, and not all name the model
        raise OSError(f"{name} cannot be fetched from the Hub: {error}") from error
