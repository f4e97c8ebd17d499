"""SLURM's warning before it takes the machine away: the job is put back into the queue once everything is saved.

A job asks for the warning with `sbatch --signal=USR1@300 --requeue` (300 seconds before its end). Lightning's own
handler saves wherever the signal finds it, in the middle of a batch or of rejection sampling; these wait for a safe
point. The first process of a job requeues it; steps of the pipeline leave it to the pipeline.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

REQUEUE_SIGNAL = signal.SIGUSR1
LEFT_TO_PARENT = "REQUEUE_LEFT_TO_PARENT"  # set by the pipeline for its steps


def in_slurm_job() -> bool:
    return "SLURM_JOB_ID" in os.environ


def job_id() -> str:
    """As scontrol takes it; of an array, this task's."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def is_first_process() -> bool:
    """Of all ranks, whether Lightning, torchrun or SLURM has started them."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


def requeue_job() -> None:
    """Put this job back into the queue. Where that cannot be done, says so: what is saved stays, the run ends."""
    if os.environ.get(LEFT_TO_PARENT) or not is_first_process():
        return
    command = ["scontrol", "requeue", job_id()]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:
        code = error
    done = "requeued" if code == 0 else f"not requeued, {' '.join(command)} gave {code}"
    print(f"SLURM job {job_id()} is {done}", flush=True)


def requeue_at_once() -> None:
    """From here on the warning ends this process, and requeues the job: for work whose results are saved as they come.

    Does nothing outside a SLURM job.
    """

    def leave(*_: Any) -> None:
        signal.signal(REQUEUE_SIGNAL, signal.SIG_IGN)
        requeue_job()
        sys.exit(128 + signal.SIGTERM)

    if in_slurm_job():
        signal.signal(REQUEUE_SIGNAL, leave)
