"""Runs an sbatch script in bash with stand-ins for Slurm's programs, and tells what the script did with them."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from tests.support.launching import ROOT, measured

SRUN = Path(__file__).with_name("fake_srun.py")
# Nodes n0, n1, ... have the addresses 127.0.0.1, 127.0.0.2, ..., which all belong to this machine.
SCONTROL = """
case "$1 $2" in
"show hostnames")
    [ "$3" = "$SLURM_JOB_NODELIST" ] || exit 1
    printf '%s\\n' n0 n1 ;;
"show node")
    echo "NodeName=$3 Arch=x86_64 CoresPerSocket=4"
    echo "   NodeAddr=127.0.0.$((${3#n} + 1)) NodeHostName=vm-$3 Port=6818" ;;
requeue*) echo "$2" >> requeued ;;
*) echo "scontrol: invalid entity: $*" >&2; exit 1 ;;
esac
"""
# The Python of the job. Ranks, merges and states of stages are recorded, one file each, and do what the test wrote into
# `on.WHAT.STAGE`; the launcher's other modules run in the real Python.
PYTHON = """
case "$3 $4" in
"launch.cli train") what=train number=$RANK ;;
"launch.slurm.job_step merge") what=merge number=0 ;;
"launch.slurm.job_step state") what=state number=0 ;;
*) exec "$python" "$@" ;;
esac
stage="${@: -1}"
record="$records/$what.$stage.$number"
echo "$what $stage $number" >> "$records/order"
printf '%s\\0' "$@" > "$record.argv"
env -0 > "$record.env"
if [ -e "$records/on.$what.$stage" ]; then . "$records/on.$what.$stage"; fi
if [ "$what" = state ]; then echo todo; fi
"""


class FakeSlurm:
    """The folder of one job: its working directory, with the programs in `bin` and what they recorded in `records`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bin, self.records = folder / "bin", folder / "records"
        for made in (self.bin, self.records):
            made.mkdir(parents=True)
        self.program("srun", f'exec {shlex.quote(sys.executable)} -IS {shlex.quote(str(SRUN))} "$@"')
        self.program("scontrol", SCONTROL)
        self.program("squeue", '[ "$*" = "--noheader --jobs=7 --format=%t" ] && cat state')
        lines = f"records={shlex.quote(str(self.records))}\npython={shlex.quote(sys.executable)}\n"
        self.python = str(self.program("python", lines + PYTHON))
        (folder / "state").write_text("R\n")

    def program(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!/bin/bash\n{body}\n")
        path.chmod(0o755)
        return path

    def on(self, what: str, stage: str, bash: str) -> None:
        """Commands that a rank of a stage (`train`), a merge or a state runs; $RANK is a rank's number."""
        (self.records / f"on.{what}.{stage}").write_text(bash + "\n")

    def run(self, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Run the script as slurmd does on the first node of job 7; its process id is in the file `batch`."""
        environ = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            **measured(),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "n[0-1]",
            **env,
        }
        (self.folder / "job.sbatch").write_text(script)
        command = ["bash", "-c", "echo $$ > batch; exec bash job.sbatch"]
        batch = subprocess.Popen(
            command, cwd=self.folder, env=environ, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            output, errors = batch.communicate(timeout=120)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(batch.pid, signal.SIGKILL)
        return subprocess.CompletedProcess(command, batch.returncode, output, errors)

    @property
    def order(self) -> list[str]:
        """What ran, as `train STAGE RANK` and so on, in order of start."""
        path = self.records / "order"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def requeued(self) -> list[str]:
        path = self.folder / "requeued"
        return path.read_text().split() if path.exists() else []

    def argv(self, what: str, stage: str, number: int = 0) -> list[str]:
        return (self.records / f"{what}.{stage}.{number}.argv").read_text().split("\0")[:-1]

    def env(self, what: str, stage: str, number: int = 0) -> dict[str, str]:
        pairs = (self.records / f"{what}.{stage}.{number}.env").read_text().split("\0")[:-1]
        return dict(pair.split("=", 1) for pair in pairs)
