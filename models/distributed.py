"""What several processes under torchrun need, and how a script starts, is stopped and ends.

torch is imported by the functions that need it: scripts that only read tables start without it.
"""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from models.checkpoint import printable

if TYPE_CHECKING:
    import torch

T = TypeVar("T")


# ------------------------------------------------------------------------- process group


def rank_and_world() -> tuple[int, int]:
    """(rank, number of processes) as torchrun sets them; (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def machine() -> tuple[int, int, int]:
    """(machine, rank on it, number of processes on it) as torchrun sets them."""
    rank, world = rank_and_world()
    local = int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", world))
    return int(os.environ.get("GROUP_RANK", 0)), *local


def init_distributed() -> "tuple[int, int, torch.device]":
    """(rank, world size, device); a process group only under torchrun."""
    import torch
    import torch.distributed as dist

    (rank, world), local = rank_and_world(), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    if cuda:
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:  # gloo, which several processes need, does not take Apple's tensors
        device = torch.device("mps" if world == 1 and mps_works() else "cpu")
    if world > 1 and not dist.is_initialized():
        # Tensors go by NCCL where there are GPUs (Windows has none), objects and barriers by gloo.
        # A rank may wait long for another that indexes a dataset or scores its last image.
        nccl = cuda and dist.is_nccl_available()
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=1))
    return rank, world, device


def mps_works() -> bool:
    """Whether torch can use Apple's GPU, with the autocast that the discriminator switches off."""
    import torch

    # Before torch 2.5 autocast refuses the device
    if not torch.backends.mps.is_available() or not torch.amp.is_autocast_available("mps"):
        return False
    try:  # a virtual machine may claim one and hold no tensor
        return torch.ones(2, device="mps").sum().item() == 2
    except RuntimeError:
        return False


def gather(item: object = None) -> list:
    """`item` of every rank, in the order of the ranks, on every rank; also a barrier."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def rank_zero_first(work: Callable[[], T]) -> T:
    """work() on each machine's first rank, then on the others, which find what that one cached."""
    first = machine()[1] == 0
    result = work() if first else None
    gather()
    return result if first else work()


def from_rank_zero(work: Callable[[], T]) -> T:
    """The result of work() on rank 0, on every rank: files that only rank 0 wrote."""
    import torch
    import torch.distributed as dist

    items = [work() if rank_and_world()[0] == 0 else None]
    if dist.is_initialized():
        dist.broadcast_object_list(items, device=torch.device("cpu"))
    return items[0]


def agree(subject: str, value: object) -> None:
    """ValueError, on every rank, unless `value` is the same on all of them.

    Machines without a shared disk may hold other files under the same names. Of dicts the first key
    that differs is named.
    """
    values = gather(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            if isinstance(other, dict):
                key = next(key for key in other if other[key] != values[0].get(key))
                subject = f"{subject}: {key} is {values[0].get(key)} and {other[key]}, which"
            raise ValueError(f"{subject} differ between rank 0 and rank {rank}; give all machines "
                             "the same files")


def check_shared(folder: str | Path, flag: str) -> None:
    """ValueError, on every rank, unless all see the same `folder`, which is made where missing."""
    if rank_and_world()[1] == 1:
        return
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    token = folder / f".shared.{from_rank_zero(time.time_ns)}.tmp"
    if rank_and_world()[0] == 0:
        token.touch()
    gather()
    deadline = time.time() + 5  # network disks show a new file late
    while not token.exists() and time.time() < deadline:
        time.sleep(0.1)
    seen = gather(token.exists())
    if rank_and_world()[0] == 0:
        token.unlink()
    if not all(seen):
        raise ValueError(f"{flag} {folder}: rank {seen.index(False)}, on another machine, does not "
                         "see rank 0's; give a folder on a shared disk")


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank; the same answer on every rank."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        return list(flags)
    total = torch.tensor(flags, dtype=torch.int32)  # on the CPU: by gloo, no GPU waits
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return total.bool().tolist()


def cleanup() -> None:
    """Wait for all ranks, then end the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        gather()  # no rank leaves while rank 0 still writes: torchrun would stop it
        dist.destroy_process_group()


# ------------------------------------------------------------------------- a script's end


@contextlib.contextmanager
def clean_exit(script: str, stopped: int = 0) -> Iterator[None]:
    """Context manager for a script's main: short error messages and clean exit codes.

    ValueError and OSError are bad input, or a full disk: `script: message` on stderr, exit code 2.
    Under torchrun the first rank that fails prints its message once; torchrun then ends the other
    ranks, whose broken collectives are not reported. With DEBUG set, tracebacks are shown.
    SIGTERM, like SIGINT, raises KeyboardInterrupt: exit code `stopped`, 0 as the script can be
    rerun, or 130 for one whose result others wait for.
    Control characters of a message are escaped, and names that cannot be printed are on stdout.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="backslashreplace")  # as stderr's
    try:
        try:
            yield
        except BaseException as error:
            # torchrun sends one where another rank ends; what is said from here on must come out
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if isinstance(error, Exception):
                _report(script, error)
            raise
    except SystemExit as stop:
        _leave(stop.code)
        raise
    except KeyboardInterrupt:
        rank, world = rank_and_world()
        # Where a rank has failed, torchrun stopped this one
        if not _count("failed", 0) and rank == 0:
            why = "a signal, or because another process was killed" if world > 1 else "a signal"
            print(f"{script}: stopped by {why}; rerun the same command to resume", file=sys.stderr)
        _leave(stopped)
        sys.exit(stopped)
    except Exception:
        if rank_and_world()[1] > 1:
            traceback.print_exc()
            _leave(1)
        raise
    _leave(0)


def _leave(code: int | str | None) -> None:
    """Under torchrun, end this process at once, without the interpreter's own finalisation.

    gloo's worker thread may still hold the tensor of the last collective; freeing it while Python
    is being finalised aborts the process (SIGABRT, in about 4 % of two-process runs, torch 2.14).
    """
    if rank_and_world()[1] > 1:
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _report(script: str, error: Exception) -> None:
    """Print bad input and exit with 2; return where a traceback is due."""
    rank, world = rank_and_world()
    text, bad_input = str(error).strip(), isinstance(error, ValueError | OSError)
    if isinstance(error, OSError) and error.filename and error.strerror:
        text = f"{error.filename}: {error.strerror.lower()}"  # not "[Errno 17] File exists: 'x'"
    if text.startswith("Caught "):  # in a data worker, with its traceback
        text = text.splitlines()[-1]
    if not bad_input and world > 1:
        if _count("failed", 0):
            sys.exit(1)
        if "closed by peer" in text or "reset by peer" in text:  # gloo's words
            text, bad_input = "another process was killed, perhaps for lack of memory", True
    _count("failed")
    if bad_input and not os.environ.get("DEBUG"):
        if _count(text) == 1:
            prefix = f"{script}: [rank {rank}]" if world > 1 else f"{script}:"
            for line in text.split("\n"):
                print(prefix, printable(line), file=sys.stderr)
        sys.exit(2)


def _count(event: str, more: int = 1) -> int:
    """Add to an event's number in torchrun's store, which all ranks share; `more` without one."""
    if rank_and_world()[1] == 1:
        return more
    import torch.distributed as dist

    key = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {event}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5)).add(key, more)
    except RuntimeError:  # the store's process has ended
        return more


class Interrupt:
    """SIGTERM and SIGINT as a flag, so that a loop can end between two steps.

    A second signal kills, except under torchrun: to a scheduler's signal it adds one of its own,
    and after 30 s it kills with SIGKILL.

    caught: the signal's name, or "". Create it in the main thread; `restore` ends it.
    """

    def __init__(self):
        self.caught = ""
        self.before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}

    def _catch(self, number: int, frame: object) -> None:
        self.caught = signal.Signals(number).name
        if rank_and_world()[1] == 1:
            self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------- data workers


def start_method() -> str:
    """How a data worker starts: forked on Linux; Windows cannot, and macOS' libraries break."""
    forks = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    return "fork" if forks else "spawn"


@contextlib.contextmanager
def dead_worker_named() -> Iterator[None]:
    """OSError, one line, where a data worker was killed: torch reports it anywhere in the loop, or
    receiving a batch over the worker's socket fails."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        receiving = isinstance(error, ConnectionError | EOFError) or (
            isinstance(error, FileNotFoundError) and error.errno and not error.filename)
        reported = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if not receiving and not reported:
            raise
        if "shared memory" in str(error):  # torch's words where a worker got SIGBUS
            raise OSError("a data worker was killed, most likely as /dev/shm is full; rerun the "
                          "same command with a larger one (docker run --shm-size=8g)") from error
        raise OSError("a data worker was killed, most likely for lack of memory; rerun the same "
                      "command with fewer --num-workers") from error


def start_worker(worker: int = 0) -> None:
    """worker_init_fn of a DataLoader."""
    keep_freed_memory()
    outlive_signals()


def keep_freed_memory() -> None:
    """With glibc, keep freed memory: fetching zeroed pages again takes a tenth to a fifth of the
    time that a data worker needs for a sample."""
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**25)  # the largest that all versions accept
        libc.mallopt(m_trim_threshold, 2**30)


def outlive_signals() -> None:
    """In a data worker: end when the parent process says so, and only then.

    A scheduler's SIGTERM, like Ctrl-C, reaches the workers too; without them the parent could not
    finish its step. (Python's handlers do not know the sender, so a thread waits for the signal.
    macOS does not tell the sender; there SIGTERM is ignored, and the parent closes the queues.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()
