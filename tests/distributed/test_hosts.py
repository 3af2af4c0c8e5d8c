"""Two hosts, as two network namespaces with a cable between them: what docs/staying-up.md starts across nodes.

Each has an address, a host name of its own and no other network. The processor and the disk are shared, as a cluster's
file system is.
"""

import os
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.tiny import tiny_config

from fastgrpo.checkpoints.store import CheckpointStore
from fastgrpo.config.sections import dump_settings
from fastgrpo.observe.run_log import read_metrics

ROOT = Path(__file__).parents[2]
HOSTS = ("fastgrpo-a", "fastgrpo-b")
# A cable's ends, by host, and their addresses.
ENDS, ADDRESSES = ("fgrpo-a", "fgrpo-b"), ("10.77.31.1", "10.77.31.2")
NAMES = "".join(f"{address} {host}\n" for address, host in zip(ADDRESSES, HOSTS, strict=True)) + "127.0.0.1 localhost\n"
TIMED = ("time/", "memory/", "ranks/", "samples_per_second")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture(scope="module")
def network():
    """Makes the hosts; skips where that needs root or iproute2."""
    if os.geteuid() or shutil.which("ip") is None or shutil.which("unshare") is None:
        pytest.skip("needs root, iproute2 and unshare")
    with ExitStack() as undo:
        for host in HOSTS:
            try:
                ip("netns", "add", host)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
            undo.callback(ip, "netns", "del", host)
            names = Path("/etc/netns", host)
            names.mkdir(parents=True)
            undo.callback(shutil.rmtree, names)
            (names / "hosts").write_text(NAMES)
        ip("link", "add", ENDS[0], "type", "veth", "peer", "name", ENDS[1])
        for host, end, address in zip(HOSTS, ENDS, ADDRESSES, strict=True):
            ip("link", "set", end, "netns", host)
            for line in (f"addr add {address}/24 dev {end}", f"link set {end} up", "link set lo up"):
                ip("-n", host, *line.split())
        yield


def on(host: str, *command: str) -> list[str]:
    """The command line that runs a command on a host."""
    named = f'hostname {host}; exec "$@"'
    return ["ip", "netns", "exec", host, "unshare", "--uts", "bash", "-c", named, host, *command]


def environment(**more: str) -> dict[str, str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | more


def finish(processes: list[subprocess.Popen]) -> None:
    try:
        for process in processes:
            output, _ = process.communicate(timeout=280)
            assert process.returncode == 0, output
    finally:
        for process in processes:
            process.kill()


def start(command: list[str], **more: str) -> subprocess.Popen:
    settings = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env=environment(**more), **settings)


@pytest.fixture(scope="module")
def recipe(tiny_flux, tmp_path_factory):
    """A config file of two iterations."""
    folder = tmp_path_factory.mktemp("hosts")
    (folder / "config.yaml").write_text(dump_settings(tiny_config(tiny_flux, folder / "one-host")), encoding="utf-8")
    return folder / "config.yaml"


@pytest.fixture(scope="module")
def one_host(recipe):
    """What two ranks of one host leave: the metrics that are not times, and every byte of the weights."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    finish([start([*command, "-m", "fastgrpo", "train", str(recipe)])])
    return result(recipe.parent / "one-host")


def result(run: Path) -> tuple[list[dict], dict[str, bytes]]:
    kept = [{k: v for k, v in line.items() if not k.startswith(TIMED)} for line in read_metrics(run)]
    assert len(kept) == 2
    assert all(line["grad_norm"] > 0 for line in kept)
    folder = CheckpointStore.of_run(run).path(2)
    shards = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
    assert shards
    return kept, shards


@pytest.mark.full
def test_torchrun_meets_across_hosts_and_trains_as_on_one(network, recipe, one_host):
    run = recipe.parent / "two-hosts"
    # As in docs/staying-up.md, with HEAD the first host.
    line = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{HOSTS[0]}:29500"]
    program = ["-m", "fastgrpo", "train", str(recipe), f"run.dir={run}", "run.resume=auto"]
    script = ["env", f"PYTHON={sys.executable}", "bash", str(ROOT / "configs/launch/torchrun.sh")]
    command = [*script, *line, "--max-restarts", "3", *program]
    finish([start(on(host, *command)) for host in HOSTS])
    assert result(run) == one_host


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
rank=0
for host in $FAKE_HOSTS; do
  SLURM_PROCID=$rank SLURM_LOCALID=0 ip netns exec "$host" unshare --uts bash -c \
    'hostname "$0"; exec "$@"' "$host" "$@" &
  rank=$((rank + 1))
done
worst=0
for job in $(jobs -p); do wait "$job"; code=$?; ((code > worst)) && worst=$code; done
exit $worst
"""
SCONTROL = """#!/bin/bash
[ "$1 $2" = "show hostnames" ] && printf '%s\\n' $FAKE_HOSTS
exit 0
"""


@pytest.mark.full
def test_the_slurm_script_meets_across_hosts_and_trains_as_on_one(network, recipe, one_host, tmp_path):
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "fastgrpo-[a-b]", "SLURM_JOB_ID": "4242", "SLURM_NTASKS": "2"}
    more = {"FAKE_HOSTS": " ".join(HOSTS), "PYTHON": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    script = ["bash", str(ROOT / "configs/launch/slurm.sh"), str(recipe), f"run.dir={tmp_path / 'run'}"]
    finish([start(script, **slurm, **more)])
    assert result(tmp_path / "run") == one_host
