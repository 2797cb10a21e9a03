"""common/hub.py: without a connection the Hub is asked once, and what is in the cache is used."""

import os
import subprocess
import sys

import pytest
from checks import ROOT
from huggingface_hub import constants

from common import hub

NOBODY = "http://127.0.0.1:9"  # the discard port: nothing listens there


def test_a_name_on_the_hub_without_a_network_is_told_at_once(tmp_path):
    variables = {"HF_ENDPOINT": NOBODY, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "chat.py", "--model", "nobody/nothing", "--prompt", "Hello"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **variables})
    assert done.returncode == 1
    assert f"nobody/nothing is not in the cache, and {NOBODY} does not answer" in done.stderr
    assert "Retry" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url):
        raise ConnectionError("refused")

    monkeypatch.setattr(hub, "get_hf_file_metadata", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_what_is_in_the_cache_is_used_without_asking_again(no_network, monkeypatch):
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda name, file: f"cache/{name}/{file}")
    hub.check_hub("owner/name")
    assert constants.HF_HUB_OFFLINE


def test_folders_and_a_chosen_offline_mode_ask_nothing(no_network, monkeypatch, tmp_path):
    hub.check_hub(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.check_hub("owner/name")


def test_an_answer_of_the_hub_is_left_to_the_download(monkeypatch):
    def missing(url):
        raise ValueError("404")

    monkeypatch.setattr(hub, "get_hf_file_metadata", missing)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.check_hub("owner/name")
    assert not constants.HF_HUB_OFFLINE


def test_a_model_that_cannot_be_fetched_is_named(monkeypatch):
    """Also where a mode without a network was chosen, in which the library's own words name no model."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="nobody/nothing cannot be fetched from the Hub"):
        hub.local_folder("nobody/nothing")
