"""A cluster of one node on the loopback: munge, a controller and a node of Slurm, started and stopped by their pids."""

import os
import secrets
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import until

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
CONF = """ClusterName=loopback
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_min_interval=100000
KillWait=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=2000
PartitionName=all Nodes={host} Default=YES
"""


def absent() -> list[str]:
    """List the programs that are not installed, or say that they want root."""
    where = os.environ["PATH"] + ":/usr/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=where) is None]
    return missing or ([] if os.geteuid() == 0 else ["root, who starts slurmd"])


def free_ports(count: int) -> list[int]:
    """Find ports that nobody listens at."""
    opened = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in opened]
    for one in opened:
        one.close()
    return ports


def say(*words: str) -> str:
    """Run a command of Slurm."""
    return subprocess.run(words, capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL).stdout


@contextmanager
def slurm(folder: Path) -> Iterator[Path]:
    """Start a cluster whose every file is in a folder; SLURM_CONF names its configuration meanwhile."""
    host, conf, key = socket.gethostname().partition(".")[0], folder / "slurm.conf", folder / "munge.key"
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    conf.write_text(CONF.format(host=host, folder=folder, ports=free_ports(2), user="root"))
    (folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")  # loaded and not used
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    munge = [f"--{part}-file={folder}/munge.{part}" for part in ("key", "pid", "log", "seed")]
    commands = (
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-f", str(conf)],
        ["slurmd", "-D", "-f", str(conf)],
    )
    before, started = dict(os.environ), []
    os.environ |= {"SLURM_CONF": str(conf), "PATH": f"{before['PATH']}:/usr/sbin"}
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "w") as out:
                pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": subprocess.STDOUT}
                started.append(subprocess.Popen(command, start_new_session=True, **pipes))
            until(lambda: (folder / "munge.socket").exists(), started[0])
        state = lambda: subprocess.run(["sinfo", "-h", "-o", "%T"], capture_output=True, text=True).stdout.strip()
        until(lambda: state() == "idle", started[-1])
        yield folder
        subprocess.run(["scancel", "--me"], check=True)
        until(lambda: not say("squeue", "--me", "--noheader"))
    finally:
        for process in reversed(started):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        os.environ.clear()
        os.environ |= before
