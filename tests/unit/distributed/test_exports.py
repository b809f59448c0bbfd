"""Environment of ranks on other machines, through DeepSpeed's own runner with stand-ins for pdsh and ssh."""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
from pathlib import Path

import pytest

from firp_cli.distributed import launch
from firp_cli.distributed.cluster import check_cores
from firp_cli.distributed.exports import EXPORTS, exported_environment
from firp_cli.errors import ClusterError
from firp_cli.machine import usable_cores

SET = {
    "FIRP_DATA_DIR": "/d with space",
    "HF_HOME": '/h$x"y',
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "3",
    "https_proxy": "http://proxy:80",
    "NCCL_DEBUG": "INFO",
    "HF_TOKEN": "hush-1",
    "WANDB_API_KEY": "hush-2",
    "HUGGING_FACE_HUB_TOKEN": "hush-3",
    "MLFLOW_TRACKING_PASSWORD": "hush-4",
    "http_proxy": "http://me:hush-5@proxy:80",
    "OTHER": "not exported",
}


def program(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_variables_reach_other_machines_and_secrets_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = tmp_path / "log"
    program(tmp_path / "pdsh", f'for word in "$@"; do printf "%s\\n" "$word"; done >> {log}\nenv > {log}.env')
    program(tmp_path / "ssh", "echo 10.0.0.1")
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for key, value in SET.items():
        monkeypatch.setenv(key, value)
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / ".deepspeed_env").write_text("MINE=7\n")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(logging.getLogger("firp"), "propagate", True)
    with caplog.at_level(logging.INFO, logger="firp"):
        assert launch.launch(None, str(tmp_path / "hosts"), ["doctor"])
    sent = log.read_text()
    assert "hush" not in sent and "OTHER" not in sent and "hush" not in (log.parent / "log.env").read_text()
    exports = next(line for line in sent.splitlines() if line.startswith("export "))
    shown = json.loads(
        subprocess.run(
            ["sh", "-c", exports + ' python3 -c "import os, json; print(json.dumps(dict(os.environ)))"'],
            env={"PATH": os.environ["PATH"]},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )  # as the other machine's shell reads them
    for key in ("FIRP_DATA_DIR", "HF_HOME", "HF_HUB_OFFLINE", "OMP_NUM_THREADS", "https_proxy"):
        assert shown[key] == SET[key], key
    assert shown["MINE"] == "7"
    assert "HF_TOKEN, HUGGING_FACE_HUB_TOKEN, MLFLOW_TRACKING_PASSWORD, WANDB_API_KEY, http_proxy" in caplog.text
    assert "log in on each machine" in caplog.text


def test_names_that_only_look_secret_are_exported() -> None:
    made = exported_environment({"TOKENIZERS_PARALLELISM": "false", "HF_ENDPOINT": "https://h", "HF_X": "a\nb"})
    assert made[EXPORTS].splitlines()[:2] == ["TOKENIZERS_PARALLELISM=false", "HF_ENDPOINT=https://h"]
    assert "HF_X" not in made[EXPORTS]


def test_many_more_ranks_than_cores_are_refused_at_once(caplog: pytest.LogCaptureFixture) -> None:
    cores = usable_cores()
    with pytest.raises(ClusterError, match=rf"--gpus {64 * cores}: .* on {cores} CPU cores"):
        check_cores(64 * cores)
    with caplog.at_level(logging.INFO, logger="firp"):
        logging.getLogger("firp").addHandler(caplog.handler)
        check_cores(2 * cores)
        logging.getLogger("firp").removeHandler(caplog.handler)
    assert f"{2 * cores} ranks share {cores} CPU cores" in caplog.text
