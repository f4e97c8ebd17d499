"""React to SLURM's warning before it takes the machine away: save everything, then put the job back into the queue.

A job asks for the warning with `sbatch --signal=USR1@300 --requeue` (300 seconds before its end). Lightning's own
handler saves at once, even in the middle of a batch or of rejection sampling. The handlers here wait for a safe point.
The first process of a job requeues it. Steps of the pipeline leave that to the pipeline.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from typing import Any

REQUEUE_SIGNAL = signal.SIGUSR1
LEFT_TO_PARENT = "REQUEUE_LEFT_TO_PARENT"  # an environment variable that the pipeline sets for its steps


def in_slurm_job() -> bool:
    """Whether this process belongs to a SLURM job."""
    return "SLURM_JOB_ID" in os.environ


def job_id() -> str:
    """The id of this job for scontrol; in a job array, the id of this task."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def is_first_process() -> bool:
    """Whether this process is rank 0, no matter if Lightning, torchrun or SLURM has started the ranks."""
    return all(int(os.environ.get(name, 0)) == 0 for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "NODE_RANK"))


def requeue_job() -> None:
    """Put this job back into the queue, and print whether that worked. The run ends in both cases."""
    if os.environ.get(LEFT_TO_PARENT) or not is_first_process():
        return
    command = ["scontrol", "requeue", job_id()]
    try:
        code = subprocess.run(command, check=False).returncode
    except OSError as error:  # no scontrol on this machine
        code = error
    done = "requeued" if code == 0 else f"not requeued, {' '.join(command)} gave {code}"
    print(f"SLURM job {job_id()} is {done}", flush=True)


def requeue_at_once() -> None:
    """From now on, SLURM's warning requeues the job and ends this process at once.

    This is for work that saves each result immediately, such as an evaluation. It does nothing outside a SLURM job.
    """

    def leave(*_: Any) -> None:
        signal.signal(REQUEUE_SIGNAL, signal.SIG_IGN)  # a second warning must not interrupt the requeuing
        requeue_job()
        sys.exit(128 + signal.SIGTERM)

    if in_slurm_job():
        signal.signal(REQUEUE_SIGNAL, leave)
