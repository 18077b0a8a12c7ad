"""Runs of several processes, usually on several hosts.

If a launcher sets the process indices (TPU pod, Slurm's srun, Open MPI's mpirun), no flags are needed; otherwise each
process needs `--coordinator`, `--num-processes` and `--process-id`. A run of one process initializes nothing.
"""

import glob
import importlib.util
import logging
import os
import re
import sys
import time

from larp_jax.errors import InputError, reason

logger = logging.getLogger(__name__)

# Seconds without a heartbeat after which a process counts as dead and the others end. JAX's default is 100 seconds.
HEARTBEAT_TIMEOUT = 30
CONNECT_TIMEOUT = 300
# Seconds that process 0 waits before it ends: its end also ends the others, which should report their errors first.
COORDINATOR_LINGERS = 2

_joined = False  # whether this process is part of a multi-process run


def initialize(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
    """Joins the processes of this run, if there are several. To be called before any use of JAX devices.

    Args:
      coordinator: HOST:PORT on which process 0 listens.
      processes: number of processes.
      process: index of this process, from 0.

    Raises:
      InputError: only some of the three are given, they are invalid, or the other processes cannot be reached.
    """
    global _joined
    given = {"--coordinator": coordinator, "--num-processes": processes, "--process-id": process}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        launcher = detect()
        if launcher is None:
            return
        arguments, who = {}, launcher
    else:
        if missing:
            raise InputError(f"{', '.join(missing)} must be given too: {', '.join(given)} go together")
        host, _, port = coordinator.rpartition(":")
        if not (host and port.isdigit()):
            raise InputError(f"--coordinator {coordinator} must be HOST:PORT of the process with --process-id 0")
        if not 0 <= process < processes:
            raise InputError(f"--process-id {process} must be below --num-processes {processes}")
        if processes == 1:
            return
        arguments = {
            "coordinator_address": coordinator,
            "num_processes": processes,
            "process_id": process,
            "cluster_detection_method": "deactivate",
        }
        who = f"process {process} of {processes}, at {coordinator}"
    import jax

    logger.info("joining the other processes (%s)", who)
    try:
        jax.distributed.initialize(
            **arguments, initialization_timeout=CONNECT_TIMEOUT, heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT
        )
    except (RuntimeError, ValueError, OSError) as error:
        if arguments or launcher != TPU:
            raise InputError(f"the other processes cannot be reached ({who}): {reason(error)}") from error
        # TPUs outside a pod, and no metadata server
        logger.warning("no TPU pod was found; running on the TPUs of this host alone")
        return
    _joined = jax.process_count() > 1
    if _joined:
        _meet()


def _meet() -> None:
    """The first sums over all processes: of one device per process, and of all devices.

    Network problems show here, while all processes are at the same point: CPUs wait only 30 seconds for the others.
    """
    import jax
    import numpy as np
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding, PartitionSpec

    multihost_utils.process_allgather(np.ones(()))
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("devices",), axis_types=(AxisType.Auto,))
    placement = NamedSharding(mesh, PartitionSpec("devices"))
    ones = jax.make_array_from_callback((count,), placement, lambda _: np.ones(1, np.float32))
    if float(jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))(ones)) != count:
        raise RuntimeError(f"a sum over {count} devices of {jax.process_count()} processes is wrong")


def check_devices() -> None:
    """`InputError` if JAX has no device to compute on. To be called first, so that no other error hides the cause."""
    import jax

    try:
        jax.devices()
    except Exception as error:  # RuntimeError, or without a CUDA plugin an AssertionError without a message
        said = "" if isinstance(error, AssertionError) else f" ({reason(error).partition(' (set JAX_PLATFORMS')[0]})"
        asked = os.environ.get("JAX_PLATFORMS")
        cure = f": JAX_PLATFORMS={asked} asks for what is not here; unset it" if asked else ""
        raise InputError(f"JAX has no device to compute on{said}{cure}, or see larp-jax doctor") from error


TPU = "TPU"


def detect() -> str | None:
    """The launcher that started this process as one of several; None if there is none."""
    several = lambda name: int(os.environ.get(name) or 1) > 1  # noqa: E731
    # in a batch script itself, outside of srun, SLURM_STEP_NODELIST is not set
    if several("SLURM_NTASKS") and {"SLURM_PROCID", "SLURM_STEP_NODELIST"} <= os.environ.keys():
        return "Slurm"
    if several("OMPI_COMM_WORLD_SIZE"):
        return "Open MPI"
    platforms = os.environ.get("JAX_PLATFORMS") or "tpu"
    if "tpu" not in platforms or importlib.util.find_spec("libtpu") is None:
        return None
    # Kubernetes sets these variables; on TPU VMs jax.distributed asks the metadata server
    workers = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    if workers is not None:
        return TPU if "," in workers or several("MEGASCALE_NUM_SLICES") else None
    has_chips = glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*")
    return TPU if has_chips and "TPU_SKIP_MDS_QUERY" not in os.environ else None


def is_first() -> bool:
    """Whether this process is the one that logs and writes files."""
    import jax

    return not _joined or jax.process_index() == 0


def explain(error: Exception) -> str | None:
    """The message for an error caused by the end of another process; None for other errors."""
    if not _joined:
        return None
    import jax

    text = str(error)
    signs = ("Gloo", "NCCL", "closed", "reset by peer", "heartbeat", "coordination service")
    if isinstance(error, jax.errors.JaxRuntimeError) and any(sign in text for sign in signs):
        ended = sorted({int(number) for number in re.findall(r"/task:(\d+)", text)} - {jax.process_index()})
        who = f"process {', '.join(map(str, ended))}" if ended else "another process"
        return (
            f"{who} of this run has ended or cannot be reached (see its messages); start all processes again"
            " with the same commands, and the run continues"
        )
    return None


def leave(code: int) -> None:
    """Ends this process after a failure, if it is one of several; otherwise returns.

    A normal exit would wait for the others, which may be waiting for this process.
    """
    if not _joined:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    if is_first():
        time.sleep(COORDINATOR_LINGERS)
    os._exit(code)
