"""The machine: each variable is checked by its name, addresses are built, secrets are masked."""

from __future__ import annotations

import subprocess
from pathlib import Path
from urllib.parse import quote

import pytest

from pipeline.errors import UserError
from pipeline.machine import Machine, commit, fingerprint, masked


@pytest.fixture(autouse=True)
def _alone(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the variables of whoever runs the tests."""
    for name in ("MDEQ_TRACKING", "GIT_DIR", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("MDEQ_WORKERS", "two", "must be a whole number of at least 0"),
        ("MDEQ_WORKERS", "-1", "must be a whole number of at least 0"),
        ("MDEQ_WORKERS", "9" * 5000, "must be a whole number of at least 0"),
        ("MDEQ_THREADS", "0", "must be a whole number of at least 1"),
        ("MDEQ_THREADS", "٣", "must be a whole number of at least 1"),
        ("MDEQ_DATA_CIFAR10", "/no/where", "no such directory"),
        ("MDEQ_DATA_IMAGENET", "~nobody-here/x", "no such directory"),
        ("MDEQ_DATA_CITYSCAPES", "a" * 5000, "no such directory"),
    ],
)
def test_a_wrong_variable_is_named(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError) as caught:
        Machine.from_environment("cpu")
    assert str(caught.value).startswith(f"{variable}=") and message in str(caught.value)


@pytest.mark.parametrize(
    "name", ["meta", "xla", "cpu:3", "cuda:x", "cuda:", "CPU", "cuda:99", "gpu\x1b[2J"]
)
def test_a_device_that_is_not_there_is_named_by_its_source(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for option, variable in ((None, name), (name, "cpu")):
        monkeypatch.setenv("MDEQ_DEVICE", variable)
        with pytest.raises(UserError) as caught:
            Machine.from_environment(option)
        source = "--device " if option else "MDEQ_DEVICE="
        assert str(caught.value).startswith(source) and "\x1b" not in str(caught.value)


@pytest.mark.parametrize("folder", ["plain", "a?b", "c%41", "d#e", "f g&h=i", "ü"])
def test_the_store_of_a_clone_lies_in_the_clone_whatever_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str
) -> None:
    root = quote(str(tmp_path / folder))
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / folder))
    expected = {
        "": f"sqlite:///{root}/mlflow.db",
        "sqlite:///runs.db": f"sqlite:///{root}/runs.db",
        "mlruns": f"file://{root}/mlruns",
        "./mlruns": f"file://{root}/mlruns",
    }
    for absolute in ("sqlite:////abs/x.db", "file:///abs/x", "http://h:1", "databricks"):
        expected[absolute] = absolute
    for given, uri in expected.items():
        monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
        assert Machine.from_environment("cpu").tracking_uri == uri


def test_options_and_variables_make_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MDEQ_WORKERS", "2")
    monkeypatch.setenv("MDEQ_DATA_CIFAR10", str(tmp_path))
    found = Machine.from_environment("cpu", workers=0, scale="paper")
    assert (found.workers, found.experiment, found.root) == (0, "mdeq-paper", tmp_path)
    assert found.data_roots == {"cifar10": tmp_path}
    monkeypatch.setenv("MDEQ_TRACKING", "off")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    found = Machine.from_environment("cpu")
    assert (found.workers, found.experiment, found.tracking_uri) == (2, "mine", None)


@pytest.mark.parametrize("secret", ["hunter2", "p@ss:w/o#r?d&", "a b%20c", "tök'en", "x\ny-z"])
def test_no_message_tells_a_secret(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    monkeypatch.setenv("CITYSCAPES_PASSWORD", secret)
    encoded = quote(secret, safe="")
    said = masked(f"http://me:{encoded}@h: {secret!r} {secret} {encoded} ?token={encoded}")
    assert not any(form in said for form in (secret, encoded, repr(secret)[1:-1]))


def test_no_message_tells_what_an_address_holds() -> None:
    address = "https://you:o/w@n@host/x?api_key=1&a=2"
    assert masked(f"no {address}") == "no https://***@host/x?api_key=***&a=2"
    assert masked("run 1 of sqlite:////home/a@b/c") == "run 1 of sqlite:////home/a@b/c"


def test_the_commit_is_gits_and_says_why_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit.cache_clear()
    assert commit(tmp_path).startswith("unknown: fatal: not a git repository")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b"]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "a").touch()
    subprocess.run([*git, "add", "a"], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    subprocess.run([*git, "-c", "tag.gpgsign=false", "tag", "v1"], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    for content, expected in (("", head.strip()), ("changed", f"{head.strip()}+")):
        commit.cache_clear()
        (tmp_path / "a").write_text(content)
        assert commit(tmp_path) == expected
    commit.cache_clear()
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # git's own switch
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert "dubious ownership" in commit(tmp_path) and str(tmp_path) in commit(tmp_path)
    commit.cache_clear()


def test_describe_and_fingerprint_are_flat_facts() -> None:
    facts = Machine.from_environment("cpu").describe() | fingerprint()
    assert {"device", "processes", "cores", "platform", "python", "commit", "torch"} <= set(facts)
    assert all(isinstance(value, str | int) for value in facts.values())
    assert facts["torch"] != "none" and fingerprint() == fingerprint()
