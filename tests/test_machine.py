"""The machine: each variable is checked by its name, addresses are built, secrets are masked."""

from __future__ import annotations

import os
import pwd
import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline import machine
from pipeline.errors import UserError
from pipeline.machine import Machine, commit, fingerprint, launcher, masked, name_user


def made(path: Path, **environ: str) -> Machine:
    return Machine.from_environment("cpu", environ={"DVC_ROOT": str(path)} | environ)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MDEQ_WORKERS", "two", "must be a whole number of at least 0"),
        ("MDEQ_WORKERS", "-1", "must be a whole number of at least 0"),
        ("MDEQ_WORKERS", "9" * 5000, "must be a whole number of at least 0"),
        ("MDEQ_THREADS", "0", "must be a whole number of at least 1"),
        ("MDEQ_THREADS", "٣", "must be a whole number of at least 1"),
        ("MDEQ_DATA_CIFAR10", "/no/where", "no such directory"),
        ("MDEQ_DATA_IMAGENET", "~nobody-here/x", "Could not determine home directory"),
        ("MDEQ_DATA_CITYSCAPES", "a" * 5000, ""),
        ("MDEQ_LAUNCH", "torchrun 'open", "No closing quotation"),
        ("WORLD_SIZE", "2", "needs RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT, too"),
        ("RANK", "1", "must be less than the 1 processes"),
        ("LOCAL_RANK", "x", "must be a whole number"),
    ],
)
def test_a_wrong_variable_is_named(tmp_path: Path, variable: str, value: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        launcher({variable: value})
        made(tmp_path, **{variable: value})
    assert str(caught.value).startswith(f"{variable}=") and message in str(caught.value)


def test_torchruns_own_variables_agree(tmp_path: Path) -> None:
    good = {"WORLD_SIZE": "4", "RANK": "3", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "1"}
    good |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    made(tmp_path, **good)
    for wrong in ({"LOCAL_RANK": "2"}, {"RANK": "4"}, {"MASTER_PORT": ""}):
        with pytest.raises(UserError, match=r"use torchrun"):
            made(tmp_path, **(good | wrong))
    assert launcher({"MDEQ_LAUNCH": "torchrun --nproc-per-node 2"})[0] == "torchrun"
    assert launcher({"MDEQ_LAUNCH": "torchrun", "RANK": "0"}) == launcher({}) == []


@pytest.mark.parametrize(
    "name",
    ["meta", "hpu", "tpu", "xla", "cpu:3", "cuda:x", "cuda:", "CPU", "cuda:99", "gpu\x1b[2J"],
)
def test_a_device_that_is_not_there_is_named_by_its_source(tmp_path: Path, name: str) -> None:
    for option, environ in ((None, {"MDEQ_DEVICE": name}), (name, {"MDEQ_DEVICE": "cpu"})):
        with pytest.raises(UserError) as caught:
            Machine.from_environment(option, environ={"DVC_ROOT": str(tmp_path)} | environ)
        source = "--device " if option else "MDEQ_DEVICE="
        assert str(caught.value).startswith(source) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("folder", ["plain", "a?b", "c%41", "d#e", "f g&h=i", "ü"])
def test_the_store_of_a_clone_lies_in_the_clone_whatever_its_path(
    tmp_path: Path, folder: str
) -> None:
    root = tmp_path / folder
    own = f"sqlite:///{quote(str(root))}/mlflow.db"
    for given in ({}, {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}):
        assert made(root, **given).tracking_uri == own
    for given in ("mlruns", "./mlruns", "file:mlruns", "file:./mlruns"):
        found = made(root, MLFLOW_TRACKING_URI=given).tracking_uri or ""
        assert found.startswith(f"file://{quote(str(root))}/") and found.endswith("mlruns")
    for given in ("sqlite:////abs/x.db", "file:///abs/x", "http://h:1", "databricks"):
        assert made(root, MLFLOW_TRACKING_URI=given).tracking_uri == given
    assert made(root, MDEQ_TRACKING="off").tracking_uri is None
    assert made(root, MLFLOW_EXPERIMENT_NAME="mine").experiment == "mine"


@pytest.mark.parametrize("address", ["http://me:se/cret@h:1", "http://me:s\n@h", "http://h:port"])
def test_an_address_that_is_none_is_refused_without_telling_its_password(
    tmp_path: Path, address: str
) -> None:
    with pytest.raises(UserError) as caught:
        made(tmp_path, MLFLOW_TRACKING_URI=address)
    assert str(caught.value).startswith("MLFLOW_TRACKING_URI: ") and "cret" not in str(caught.value)


@pytest.mark.parametrize("secret", ["hunter2", "p@ss:w/o#r?d&", "a b%20c", "tök'en", "x\ny-z"])
def test_no_message_tells_a_secret(secret: str) -> None:
    address = f"https://me:{secret}@host:5000/api?token={quote(secret)}&run=1"
    environments = (
        {"MLFLOW_TRACKING_URI": address},
        {"MLFLOW_TRACKING_TOKEN": secret},
        {"CITYSCAPES_PASSWORD": secret},
    )
    for environ in environments:
        said = f"cannot reach {address}: {secret!r} {secret} {quote(secret, safe='')}"
        for part in (secret, quote(secret), quote(secret, safe=""), repr(secret)[1:-1]):
            assert part not in masked(said, environ)
    assert masked("run 1 of sqlite:////home/a@b/c", {"URI": "sqlite:////home/a@b/c"}).endswith(
        "a@b/c"
    )
    assert (
        masked("https://you:own@host/x?api_key=1&a=2", {}) == "https://***@host/x?api_key=***&a=2"
    )


def test_the_commit_is_gits_and_says_where_git_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for key in ("GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(key, raising=False)
    assert commit(tmp_path) == "none"
    commit.cache_clear()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    assert commit(tmp_path) == head.strip()
    commit.cache_clear()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert commit(tmp_path).startswith(
        "unknown: git refuses another user's checkout; allow it with"
    )
    assert str(tmp_path) in commit(tmp_path)
    commit.cache_clear()


def test_a_user_without_name_and_home_gets_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("LOGNAME", "USER", "LNAME", "USERNAME", "HOME"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    name_user()
    assert os.environ["LOGNAME"].startswith("uid-") and Path.home().is_dir()
    for key in ("LOGNAME", "HOME"):
        monkeypatch.delenv(key)


def test_describe_and_fingerprint_are_flat_facts(tmp_path: Path) -> None:
    facts = made(tmp_path).describe() | fingerprint()
    assert {"device", "processes", "cores", "platform", "python", "commit", "torch"} <= set(facts)
    assert all(isinstance(value, str | int) for value in facts.values())
    assert machine.versions()["torch"] != "none" and fingerprint() == fingerprint()
