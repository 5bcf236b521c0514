"""Checkpoints: whole or not at all, strictly typed, and never executed."""

import os
import pickle
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

from mdeq import Anderson, ClassificationHeadConfig, Gmres, Implicit, MDEQConfig, Network, SegmentationHeadConfig
from mdeq.baselines import ExplicitConfig, NeuralODEConfig, ResNetConfig
from pipeline.checkpoints import Architecture, CheckpointError, RunState, load_model, read, save_model, write_atomically

MDEQ_SMALL = Architecture(
    MDEQConfig(channels=(8, 8), expansion=2, groups=4, upsampling="bilinear"),
    ClassificationHeadConfig((4, 4), 16),
    classes=5,
    forward=Anderson(steps=7),
    backward=Implicit(Gmres(steps=3)),
)


@pytest.mark.parametrize(
    "architecture",
    [
        MDEQ_SMALL,
        Architecture(MDEQConfig(channels=(8,), groups=4), SegmentationHeadConfig("highest"), classes=19),
        Architecture(ResNetConfig(), None, classes=10),
        Architecture(NeuralODEConfig(filters=4, augmented=2, image=16), None, classes=10),
        # its weights are for 1000 classes: a model that comes back never asks for them
        Architecture(ExplicitConfig("resnet18", weights="default", small_input=True), None, classes=10),
    ],
    ids=["classification", "segmentation", "narrow", "ode", "explicit"],
)
def test_a_model_comes_back_with_its_architecture(tmp_path, architecture):
    torch.manual_seed(0)
    model = architecture.build()
    save_model(tmp_path / "model.pt", architecture, model, {"stage": "classify", "seed": 0})
    loaded, again, meta = load_model(tmp_path / "model.pt")
    assert again == architecture and meta == {"stage": "classify", "seed": 0}
    image = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(loaded(image).logits, model.eval()(image).logits, rtol=0, atol=0)
    if isinstance(loaded, Network):
        assert loaded.backbone.forward_solver == (architecture.forward or loaded.backbone.forward_solver)


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_malicious_file_is_refused_and_runs_nothing(tmp_path):
    for write in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        write({"format": 1, "architecture": Malicious(tmp_path / "ran")}, tmp_path / "model.pt")
        with pytest.raises(CheckpointError, match="model.pt: damaged, or not a checkpoint"):
            load_model(tmp_path / "model.pt")
    assert not (tmp_path / "ran").exists()


def test_damaged_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="absent.pt: no such file"):
        load_model(tmp_path / "absent.pt")
    save_model(tmp_path / "model.pt", MDEQ_SMALL, MDEQ_SMALL.build(), {})
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "half.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="half.pt: damaged"):
        load_model(tmp_path / "half.pt")
    torch.save({"state_dict": {}}, tmp_path / "foreign.pt")
    with pytest.raises(CheckpointError, match="foreign.pt: not a model of this project"):
        load_model(tmp_path / "foreign.pt")


def test_a_write_that_fails_keeps_the_previous_file(tmp_path):
    path = tmp_path / "state.pt"
    write_atomically(path, {"step": 1})
    with pytest.raises(CheckpointError, match=r"state.pt: cannot be written .*MB are needed, .*MB are free"):
        write_atomically(path, _FailsHalfWay(step=2))
    assert read(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_room_it_needs(tmp_path):
    path, limits = tmp_path / "state.pt", resource.getrlimit(resource.RLIMIT_FSIZE)
    write_atomically(path, {"step": 1})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the kernel refuses to write on, as when full
    try:
        with pytest.raises(CheckpointError, match=r"state.pt: cannot be written .*; 4.0 MB are needed") as caught:
            write_atomically(path, {"model": {"weight": torch.zeros(1_000_000)}})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert read(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_may_not_be_written_is_named():
    with tempfile.TemporaryDirectory() as folder:  # one that others may enter, unlike tmp_path
        os.chmod(folder, 0o555)
        root = os.geteuid() == 0
        try:
            if root:  # who may write everywhere
                os.seteuid(65534)
            with pytest.raises(CheckpointError, match=r"state.pt: cannot be written \(\[Errno 13\] Permission denied"):
                write_atomically(Path(folder, "state.pt"), {"step": 1})
        finally:
            if root:
                os.seteuid(0)
            os.chmod(folder, 0o755)


def test_one_process_a_model_and_others_states_are_left_alone(tmp_path):
    """Two experiments of one stage at once: each has its state, and the first to finish leaves the other's."""
    ours = RunState(tmp_path, {"lr": 1}, "seed-0")
    code = (
        "import sys; from pathlib import Path; from pipeline.checkpoints import RunState\n"
        "state = RunState(Path(sys.argv[1]), {'lr': int(sys.argv[2])}, 'seed-0'); state.claim()\n"
        "state.save({'step': 7}); print('ready', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, "2"], cwd=Path(__file__).parents[1], **pipes) as other:
        assert other.stdout and other.stdout.readline() == "ready\n"
        theirs = RunState(tmp_path, {"lr": 2}, "seed-0")
        with pytest.raises(CheckpointError, match="another process is training this very model"):
            theirs.claim()
        ours.claim()
        ours.save({"step": 1})
        ours.delete()
        assert theirs.load() == {"step": 7}
        other.kill()
        other.wait()
        theirs.claim()  # the kernel let go of it


class _FailsHalfWay(dict):
    def __reduce__(self):
        raise OSError(28, "No space left on device")


def test_state_of_other_params_is_told_apart_and_goes_once_the_new_is_safe(tmp_path):
    old = RunState(tmp_path, {"params": {"batch": 8, "optimizer": {"lr": 0.1}}, "torch": "2.9"}, "seed-0")
    old.save({"step": 5})
    new = RunState(tmp_path, {"params": {"batch": 8, "optimizer": {"lr": 0.2}}, "torch": "2.9"}, "seed-0")
    assert new.load() is None and old.load() == {"step": 5}
    assert new.differences() == ["params.optimizer.lr"] and old.differences() == []
    new.save({"step": 1})
    assert old.load() is None and new.load() == {"step": 1}
    new.delete()
    assert not tmp_path.exists()
