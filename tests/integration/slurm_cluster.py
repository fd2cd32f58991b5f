"""A Slurm cluster of two nodes on this machine: munged, slurmctld, two slurmd as child processes, private ports."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from launch.supervise.guard import guarded
from launch.supervise.rank_process import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
NODE_CPUS = 4

CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool.%n
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmdLogFile={folder}/slurmd.%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
ReturnToService=2
KillWait=10
MinJobAge=600
SchedulerParameters=batch_sched_delay=1,sched_interval=5
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_0} CPUs={cpus} RealMemory=4000
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={port_1} CPUs={cpus} RealMemory=4000
PartitionName=main Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if program(name) is None]


def program(name: str) -> str | None:
    """Path of a program. Daemons are in sbin, which may be missing from PATH."""
    return shutil.which(name) or shutil.which(name, path="/usr/sbin:/usr/local/sbin")


class SlurmCluster:
    """`with SlurmCluster() as cluster`: use cluster.env for sbatch and dromos."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.env = {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> SlurmCluster:
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def _start(self) -> None:
        for name in ("state", "spool.n0", "spool.n1"):
            (self.folder / name).mkdir()
        key = self.folder / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        values = {
            "folder": self.folder,
            "host": os.uname().nodename,
            "user": getpass.getuser(),
            "cpus": NODE_CPUS,
            "controller_port": free_port(),
            "port_0": free_port(),
            "port_1": free_port(),
        }
        (self.folder / "slurm.conf").write_text(CONF.format(**values))
        files = {name: f"{self.folder}/munge.{name}" for name in ("socket", "pid", "log", "seed")}
        options = [f"--{name}{'' if name == 'socket' else '-file'}={path}" for name, path in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-c")
        for node in ("n0", "n1"):
            self._daemon("slurmd", "-D", "-N", node)
        self._until(self._idle, "two idle nodes")

    def _daemon(self, name: str, *arguments: str) -> None:
        path = program(name)
        assert path is not None
        with open(self.folder / f"{name}.out", "ab") as out:
            process = subprocess.Popen(
                guarded([path, *arguments], signal.SIGTERM),
                env=self.env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self.daemons.append(process)

    def _idle(self) -> bool:
        shown = self.command("sinfo", "--noheader", "--Node", "--format=%N %t", check=False).stdout.split()
        return shown.count("idle") == 2

    def _until(self, true: object, what: str, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not true():  # type: ignore[operator]
            if time.monotonic() > deadline:
                raise RuntimeError(f"no {what} after {seconds} s\n{self.logs()}")
            time.sleep(0.1)

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return subprocess.run(arguments, env=self.env, capture_output=True, text=True, check=check)

    def logs(self) -> str:
        found = [*self.folder.glob("*.log"), *self.folder.glob("*.out")]
        return "\n".join(
            f"== {path.name}\n{path.read_text(errors='replace')[-3000:]}" for path in sorted(found)
        )

    def end_jobs(self) -> None:
        """Kill all jobs: slurmstepd and its tasks outlive slurmd."""
        jobs = self.command("squeue", "--noheader", "--format=%i", check=False).stdout.split()
        for flags in (["--signal=KILL", "--full"], []):
            for job in jobs:
                self.command("scancel", *flags, job, check=False)
        deadline = time.monotonic() + 15
        while jobs and time.monotonic() < deadline:
            jobs = self.command("squeue", "--noheader", "--format=%i", check=False).stdout.split()
            time.sleep(0.2)

    def stop(self) -> None:
        if self.daemons:
            self.end_jobs()
        for process in reversed(self.daemons):
            process.terminate()
        for process in self.daemons:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)
