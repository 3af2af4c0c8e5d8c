"""The launch scripts, with a scheduler of two small scripts in place of Slurm's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from support.tiny import tiny_config

from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.config.sections import dump_settings
from fastgrpo.distributed.world import start_world
from fastgrpo.errors import UserError
from fastgrpo.training.trainer import Trainer

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/bash
echo "$*" >> "$FAKE/steps"
while [[ $1 == --* ]]; do
  [[ $1 == --ntasks=* ]] && SLURM_NTASKS=${1#*=}
  shift
done
for ((rank = 0; rank < SLURM_NTASKS; rank++)); do
  SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" &
  echo $! >> "$FAKE/pids"
done
worst=0
for job in $(jobs -p); do wait "$job"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && echo 127.0.0.1
[ "$1" = requeue ] && echo "$2" > "$FAKE/requeued"
exit 0
"""


@pytest.fixture
def submit(tiny_flux, tmp_path):
    """Starts configs/launch/slurm.sh on the tiny FLUX, for so many ranks and iterations."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    config = tmp_path / "config.yaml"

    def start(ranks: int, iterations: int, rewards: list | None = None, **more: str) -> subprocess.Popen:
        sections: dict = {"train": {"iterations": iterations}} | ({} if rewards is None else {"rewards": rewards})
        settings = tiny_config(tiny_flux, tmp_path / "run", **sections)
        config.write_text(dump_settings(settings), encoding="utf-8")
        slurm = {"SLURM_JOB_NODELIST": "a", "SLURM_JOB_ID": "4242", "SLURM_NTASKS": str(ranks)}
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | slurm | {"FAKE": str(tmp_path), "PYTHON": sys.executable, "PYTHONPATH": paths} | more
        environment["PATH"] = f"{tmp_path}{os.pathsep}{environment['PATH']}"
        command = ["bash", str(ROOT / "configs/launch/slurm.sh"), str(config)]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    return start


def interrupt(folder: Path) -> None:
    """SIGUSR1 to every task, as Slurm sends it, once an iteration is logged."""
    limit = time.monotonic() + 300
    while not (folder / "run" / "metrics.jsonl").exists() or not (folder / "run" / "metrics.jsonl").read_text():
        assert time.monotonic() < limit, "no iteration was logged"
        time.sleep(0.1)
    for pid in (folder / "pids").read_text().split():
        os.kill(int(pid), signal.SIGUSR1)


@pytest.mark.parametrize("name", ["slurm.sh", "torchrun.sh"])
def test_the_script_is_a_script(name):
    subprocess.run(["bash", "-n", str(ROOT / "configs/launch" / name)], check=True)


@pytest.mark.parametrize("tasks, local", [("2(x4)", "2"), ("2,1", "2"), (None, "2")])
def test_slurm_tells_ranks_how_many_their_node_has(submit, tmp_path, tasks, local):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\necho "$RANK $LOCAL_WORLD_SIZE" >> {tmp_path}/told\n')
    python.chmod(0o755)
    more = {} if tasks is None else {"SLURM_STEP_TASKS_PER_NODE": tasks}
    assert submit(2, 1, PYTHON=str(python), **more).wait(60) == 0
    assert sorted((tmp_path / "told").read_text().splitlines()) == [f"0 {local}", f"1 {local}"]


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_slurm_requeues_a_preempted_run_which_then_goes_on(submit, tmp_path, ranks):
    job = submit(ranks, 400)
    interrupt(tmp_path)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 75, errors
    assert (tmp_path / "requeued").read_text().strip() == "4242"
    (stopped,) = CheckpointStore.of_run(tmp_path / "run").iterations()
    assert 0 < stopped < 400

    (tmp_path / "requeued").unlink()
    again = submit(ranks, stopped + 1)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert not (tmp_path / "requeued").exists()
    assert stopped + 1 in CheckpointStore.of_run(tmp_path / "run").iterations()


@pytest.mark.full
def test_slurm_serves_a_reward_beside_the_job_and_gives_each_step_its_cores_and_container(submit, tmp_path):
    (tmp_path / "serve.yaml").write_text("rewards: [{name: shapes}]")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    remote = [{"name": "remote", "options": {"url": "http://elsewhere:1", "reward": "shapes"}}]
    more = {"REWARDS": str(tmp_path / "serve.yaml"), "REWARD_PORT": str(port), "SLURM_CPUS_PER_TASK": "8",
            "CONTAINER": "/images/x.sqsh", "MOUNTS": "/data:/data", "FASTGRPO_REWARD_TOKEN": "t" * 32}  # fmt: skip
    job = submit(1, 2, remote, **more)
    _, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["samples/failed"] == 0 for line in metrics)
    serve, train = (tmp_path / "steps").read_text().splitlines()[:2]
    for step in (serve, train):
        assert step.startswith("--cpus-per-task=8 --container-image=/images/x.sqsh --container-mounts=")
        assert ",/data:/data --container-workdir=" in step
    assert "--overlap --nodes=1 --ntasks=1 --nodelist=127.0.0.1" in serve
    assert "--kill-on-bad-exit=1" in train
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)), "the server has ended with the job"


@pytest.fixture
def torchrun(tiny_flux, tmp_path):
    """Starts configs/launch/torchrun.sh with two ranks whose iterations take so many seconds."""

    def start(seconds: float, iterations: int, *flags: str) -> subprocess.Popen:
        slow = [{"name": "support.slow:SlowReward", "options": {"seconds": seconds}}]
        settings = tiny_config(
            tiny_flux, tmp_path / "run", rollout={"group_size": 4}, train={"iterations": iterations}, rewards=slow,
            checkpoint={"every": 1},
        )  # fmt: skip
        (tmp_path / "c.yaml").write_text(dump_settings(settings), encoding="utf-8")
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ["PYTHONPATH"]])
        command = ["bash", str(ROOT / "configs/launch/torchrun.sh"), "--standalone", "--nproc-per-node", "2", *flags]
        command += ["-m", "fastgrpo", "train", str(tmp_path / "c.yaml"), "run.resume=auto"]
        errors = (tmp_path / "errors").open("w")
        return subprocess.Popen(
            command, env=os.environ | {"PYTHON": sys.executable, "PYTHONPATH": paths}, stderr=errors
        )

    return start


def wait_for(there, process: subprocess.Popen, seconds: float = 300) -> None:
    limit = time.monotonic() + seconds
    while not there():
        assert process.poll() is None, "ended before"
        assert time.monotonic() < limit, "never came"
        time.sleep(0.2)


def ranks_of(process: subprocess.Popen) -> list[int]:
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return [int(child) for child in children if b"fastgrpo" in Path(f"/proc/{child}/cmdline").read_bytes()]


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_torchrun_waits_for_a_long_iteration_to_end_with_a_checkpoint(torchrun, tmp_path, number):
    job = torchrun(45, 50)
    doing = tmp_path / "run" / "ranks" / "1.json"
    wait_for(lambda: doing.exists() and "reward" in doing.read_text(), job)
    ranks = ranks_of(job)
    assert len(ranks) == 2
    job.send_signal(number)
    # torchrun raises its signal: its own exit code says nothing of the ranks.
    assert job.wait(300) == 1
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert (events[-1]["event"], events[-1]["why"]) == ("end", "preempted")
    assert CheckpointStore.of_run(tmp_path / "run").iterations() == [0]
    assert "forcefully" not in (tmp_path / "errors").read_text()


@pytest.mark.full
def test_torchrun_starts_ranks_again_from_the_last_checkpoint(torchrun, tmp_path):
    job = torchrun(1, 5, "--max-restarts", "2")
    lines = tmp_path / "run" / "metrics.jsonl"
    wait_for(lambda: lines.exists() and len(lines.read_text().splitlines()) > 1, job)
    os.kill(ranks_of(job)[-1], signal.SIGKILL)
    assert job.wait(400) == 0, (tmp_path / "errors").read_text()
    assert [json.loads(line)["iteration"] for line in lines.read_text().splitlines()] == [0, 1, 2, 3, 4]
    assert CheckpointStore.of_run(tmp_path / "run").iterations()[-1] == 5


def test_a_port_that_is_taken_is_told(tiny_flux, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(other.getsockname()[1])}
        for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | place).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"MASTER_PORT: ranks cannot meet at 127.0.0.1:{place['MASTER_PORT']}: "):
            start_world(tiny_config(tiny_flux, tmp_path / "run", parallel={"timeout": 5.0}))


def test_a_rank_whose_peer_never_starts_says_so_and_gives_up(tiny_flux, tmp_path, monkeypatch, capfd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name, value in (place | {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    sections = {"telemetry": {"stall_seconds": 0.3}, "parallel": {"timeout": 1.5}}
    config = tiny_config(tiny_flux, tmp_path / "run", **sections)
    with pytest.raises(dist.DistStoreError, match="1/2 clients joined"):
        Trainer.from_config(config)
    said = f"warning: rank 0 of 2 waits for others to start, at 127.0.0.1:{port}\n"
    assert capfd.readouterr().err.count(said) == 1
    assert not (tmp_path / "run").exists()
