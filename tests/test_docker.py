"""The image without a daemon: what goes into it, and its command, stopped as `docker stop` does."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from docker.utils import exclude_paths
from ruamel.yaml import YAML
from test_pipeline import OUT, same_weights, small, write

ROOT = Path(__file__).parents[1]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
NAMESPACE = ["unshare", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def copied(folder: Path) -> list[str]:
    """The files below `folder` that the build would copy."""
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    found = exclude_paths(str(folder), ignored) - {".dockerignore", "Dockerfile"}
    return sorted(path for path in found if (folder / path).is_file())


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """The image's /app, with a tiny CIFAR-10 and a tiny model in it and nothing else to run."""
    for path in copied(ROOT):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    yaml = YAML(typ="safe")
    params = small()
    params["classify"]["mdeq-small"] |= {"batch": 8, "epochs": 3}
    write(params, tmp_path)
    stages = yaml.load(tmp_path / "dvc.yaml")["stages"]
    stages["prepare"]["foreach"] = {"cifar10": {}}
    yaml.dump(
        {"stages": {name: stages[name] for name in ("prepare", "classify")}}, tmp_path / "dvc.yaml"
    )
    return tmp_path


def test_the_image_takes_what_git_has_and_no_data_results_or_secrets(app: Path) -> None:
    before = copied(app)
    assert "pipeline/stages/report.py" in before and "tests/conftest.py" not in before
    for name in (
        ".env",
        ".git/config",
        ".venv/bin/python",
        ".dvc/config.local",
        ".dvc/cache/0",
        "mlflow.db",
    ):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).touch()
    for folder in ("data", "results", "work", "mlartifacts", "predictions", "pipeline/__pycache__"):
        (app / folder).mkdir(exist_ok=True)
        (app / folder / "file").touch()
    assert copied(app) == before


def test_no_port_is_open_to_the_network() -> None:
    services = YAML(typ="safe").load(ROOT / "compose.yaml")["services"]
    ports = [port for service in services.values() for port in service.get("ports", ())]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def can_be_pid_1() -> bool:
    if not (shutil.which("unshare") and shutil.which("dumb-init", path=PATH)):
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(
    not can_be_pid_1(),
    reason="needs dumb-init and a PID namespace: Linux that allows user namespaces",
)
def test_docker_stop_ends_it_and_the_same_command_resumes(app: Path) -> None:
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("MDEQ_", "MLFLOW_", "DVC_"))
    }
    environment |= {"PATH": PATH, "MDEQ_THREADS": "1", "MDEQ_DEVICE": "cpu"}
    entry, command = (
        json.loads(found) for found in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", DOCKERFILE, re.M)
    )
    stop = getattr(signal, re.findall(r"^STOPSIGNAL (\w+)$", DOCKERFILE, re.M)[0])

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*NAMESPACE, *entry, *command],
            cwd=app,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    (app / ".dvc/config.local").write_text("[core]\n    no_scm = true\n")
    container = start()
    while not list(app.glob("work/classify-mdeq-small/*/*.pt")):
        assert container.poll() is None, container.communicate()[0]
        time.sleep(0.01)
    (first,) = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
    os.kill(int(first), stop)
    said, _ = container.communicate(
        timeout=120
    )  # some seconds, of the 10 that Docker grants, where nothing else runs
    assert container.returncode == 130 and "Traceback" not in said, said
    assert not (app / OUT / "metrics.json").exists()
    held = json.loads((app / ".dvc/tmp/rwlock").read_text())
    assert not any(held.get("write", {}).values()) and not any(held.get("read", {}).values())

    said, _ = start().communicate(timeout=600)
    assert "results.json: no such file" in said, said  # its last command looks for a report
    with contextlib.closing(sqlite3.connect(app / "mlflow.db")) as store:
        runs = store.execute(
            "SELECT count(*) FROM tags WHERE key = 'stage' AND value = 'classify'"
        ).fetchone()
    assert runs == (1,)  # the one that was interrupted

    whole = app / "whole"
    (whole / OUT).parent.mkdir(parents=True)
    (app / OUT).rename(whole / OUT)
    train = [sys.executable, "-m", "pipeline", "classify", "mdeq-small"]
    environment |= {"MDEQ_TRACKING": "off"}
    subprocess.run(train, cwd=app, env=environment, check=True, capture_output=True)
    assert same_weights(app, whole)
