"""States and models: whole or absent, verified, never executed, and one process at a time."""

from __future__ import annotations

import errno
import fcntl
import io
import os
import resource
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from toys import ARCHITECTURE, network

from pipeline import files
from pipeline.errors import UserError
from pipeline.train import checkpoints
from pipeline.train.checkpoints import RunState, load_model, save_model

STATE = {"model": {"weight": torch.arange(300.0)}, "state": {"step": 7, "history": [{"lr": 0.1}]}}


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    found = RunState(tmp_path / "work", {"lr": 1}, "seed-0", lambda: 123)
    found.save(STATE)
    return found


def test_a_model_comes_back_with_architecture_and_facts(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model = network().eval()
    save_model(path, model, ARCHITECTURE, {"stage": "classify", "seed": 0})
    loaded, architecture, facts = load_model(path)
    assert architecture == ARCHITECTURE and facts == {"stage": "classify", "seed": 0}
    assert not loaded.training
    image = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).logits, model(image).logits, rtol=0, atol=0)


def test_a_state_comes_back(state: RunState, tmp_path: Path) -> None:
    loaded = state.load()
    assert loaded is not None and loaded["state"] == STATE["state"] and loaded["position"] == 123
    assert torch.equal(loaded["model"]["weight"], STATE["model"]["weight"])
    assert RunState(tmp_path / "work", {"lr": 2}, "seed-0").load() is None


def damaged(whole: bytes) -> list[bytes]:
    """The same content cut short, or with one bit changed."""
    found = [whole[:length] for length in (0, 9, len(whole) // 2, len(whole) - 1)]
    for position in range(0, len(whole), max(97, len(whole) // 30)):
        changed = bytearray(whole)
        changed[position] ^= 1
        found.append(bytes(changed))
    return found


def test_any_damage_is_found_and_named_with_the_way_out(state: RunState, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    again = f"{state.path}: damaged; delete {state.path} and rerun: training starts again"
    restore = f"{model}: .*; restore it with `dvc repro`, or import it again"
    with pytest.raises(UserError, match=restore):
        load_model(model)
    save_model(model, network(), ARCHITECTURE, {})
    for path, read, cure in (
        (state.path, state.load, again),
        (model, partial(load_model, model), restore),
    ):
        for content in damaged(path.read_bytes()):
            path.write_bytes(content)
            with pytest.raises(UserError, match=cure) as caught:
                read()
            assert "\n" not in str(caught.value)


class Malicious:
    """Runs a function when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):  # noqa: ANN204
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("content", [[1], {"state": {}}, {"position": "x"}, Malicious])
def test_a_file_of_other_content_is_refused_and_runs_nothing(
    state: RunState, tmp_path: Path, content: Any
) -> None:
    """Even with the digest of a state."""
    saved = io.BytesIO()
    torch.save({"a": Malicious(tmp_path / "ran")} if content is Malicious else content, saved)
    payload = saved.getvalue()
    for end, reason in ((b"", "damaged"), (files.digest(payload).encode(), "not a state")):
        state.path.write_bytes(payload + end)
        with pytest.raises(UserError, match=f"{reason}.*; delete .* and rerun"):
            state.load()
        with pytest.raises(UserError, match="restore it"):
            load_model(state.path)
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_keeps_the_last_state_and_names_the_room_it_needs(state: RunState) -> None:
    big = STATE | {"model": {"weight": torch.zeros(1_000_000)}}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(UserError, match=r"seed-0.pt: cannot be written .* 4.0 MB are needed"):
            state.save(big)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    loaded = state.load()
    assert loaded is not None and loaded["state"] == STATE["state"]
    assert sorted(path.name for path in state.work.iterdir()) == ["identity.json", "seed-0.pt"]


def test_files_are_replaced_and_never_written_through_a_link(
    state: RunState, tmp_path: Path
) -> None:
    """DVC's cache may hold the same file under another name."""
    model = tmp_path / "model.safetensors"
    save_model(model, network(), ARCHITECTURE, {})
    for path, write in (
        (state.path, lambda: state.save(STATE | {"more": 1})),
        (model, lambda: save_model(model, network(), ARCHITECTURE, {"more": 1})),
    ):
        kept = tmp_path / "cache"
        os.link(path, kept)
        before = kept.read_bytes()
        write()
        assert kept.read_bytes() == before != path.read_bytes()
        kept.unlink()


def test_an_older_state_of_other_params_goes_once_the_new_one_is_safe(tmp_path: Path) -> None:
    identities = [{"params.batch": 8, "params.optimizer": {"lr": lr}} for lr in (0.1, 0.2)]
    old, new = (RunState(tmp_path / "work", identity, "seed-0") for identity in identities)
    old.save({"step": 5})
    assert new.load() is None
    assert checkpoints.differences(new.work, identities[1]) == ["params.optimizer"]
    assert checkpoints.differences(old.work, identities[0]) == []
    new.save({"step": 1})
    assert old.load() == {"step": 5, "position": 0}  # nothing is lost by a first save alone
    new.save({"step": 2})
    assert old.load() is None and new.load() == {"step": 2, "position": 0}
    checkpoints.delete(new.work)
    assert not (tmp_path / "work").exists()


def test_two_trainings_never_share_state_or_results(tmp_path: Path) -> None:
    """Another process trains from the state `one` into the results `a`, until it is killed."""
    locks, one, a = tmp_path / "locks", tmp_path / "work/one", tmp_path / "results/a"
    ready, write = os.pipe()
    child = os.fork()
    if child == 0:
        with checkpoints.claimed(one, a, locks):
            (one / "state.pt").touch()
            os.write(write, b"!")
            time.sleep(600)
    os.read(ready, 1)
    name, training = "training a model of this name", "training this very model"
    cases = [("one", "a", name), ("two", "a", name), ("one", "b", training)]
    for work, results, busy in cases:
        claim = checkpoints.claimed(tmp_path / "work" / work, tmp_path / "results" / results, locks)
        with pytest.raises(UserError, match=f"another process is {busy}; let it finish"), claim:
            pass
    with checkpoints.claimed(tmp_path / "work/two", tmp_path / "results/b", locks):
        checkpoints.delete_others(tmp_path / "work/two")
        assert (one / "state.pt").exists()  # it is in use
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with checkpoints.claimed(one, a, locks):  # the kernel freed it
        checkpoints.delete_others(one)
    assert not (tmp_path / "work/two").exists()


def test_a_file_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    with pytest.raises(UserError, match="this file system has no locks .* a local disk"):
        with checkpoints.claimed(tmp_path / "a", tmp_path / "b", tmp_path / "locks"):
            pass
