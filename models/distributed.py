"""What several processes under torchrun need, and how a script ends."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


def init_distributed() -> tuple[int, int, torch.device]:
    """(rank, world size, device); a process group only under torchrun."""
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        # Tensors go by NCCL where there are GPUs, objects and barriers by gloo. A rank may wait
        # long for another that indexes a dataset or scores its last image.
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(days=1))
    return int(os.environ.get("RANK", 0)), world, device


def gather(item: object = None) -> list:
    """`item` of every rank, in the order of the ranks, on every rank; also a barrier."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def rank_zero_first(work: Callable[[], T]) -> T:
    """work() on rank 0, then on the others, who find what it cached."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    result = work() if main else None
    gather()
    return result if main else work()


@contextlib.contextmanager
def clean_exit(script: str) -> Iterator[None]:
    """Around a script's main: what its user sees of bad input, of a signal, of another rank's end.

    ValueError and OSError are bad input, or a full disk: `script: message` on stderr, exit code 2.
    Under torchrun that is said once, by the first rank that meets it; torchrun then ends the
    others, and what they say of their broken collectives is left out. With DEBUG set, tracebacks.
    SIGTERM, as SIGINT, raises KeyboardInterrupt: exit code 0, for the same command goes on.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            yield
        except Exception as error:
            _report(script, error)
            raise
    except SystemExit:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which has seen another end
        raise
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun sends another
        # Where a rank has failed, it was torchrun that stopped this one
        if not _count("failed", 0) and int(os.environ.get("RANK", 0)) == 0:
            ranks = int(os.environ.get("WORLD_SIZE", 1)) > 1  # torchrun's, where one was killed
            why = "a signal, or because another process was killed" if ranks else "a signal"
            print(f"{script}: stopped by {why}; the same command goes on", file=sys.stderr)
        sys.exit(0)


def _report(script: str, error: Exception) -> None:
    """Print what is bad input and exit; return where a traceback is due."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    text, bad_input = str(error).strip(), isinstance(error, ValueError | OSError)
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
            rank = f"[rank {os.environ['RANK']}] " if world > 1 else ""
            for line in text.splitlines():
                print(f"{script}: {rank}{line}", file=sys.stderr)
        sys.exit(2)


def _count(event: str, more: int = 1) -> int:
    """Add to an event's number in torchrun's store, which all ranks share; `more` without one."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return more
    key = f"{os.environ.get('TORCHELASTIC_RESTART_COUNT')} {event}"
    try:
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.TCPStore(*address, is_master=False, timeout=timedelta(seconds=5)).add(key, more)
    except RuntimeError:  # its host has ended
        return more


@contextlib.contextmanager
def dead_worker_named():
    """OSError, one line, where a data worker was killed: torch raises at any point of the loop, or
    taking over a batch fails, whose memory the worker hands out through a socket."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        taking_over = isinstance(error, ConnectionError | EOFError) or (
            isinstance(error, FileNotFoundError) and error.errno and not error.filename)
        told = isinstance(error, RuntimeError) and "DataLoader worker" in str(error)
        if not taking_over and not told:
            raise
        if "shared memory" in str(error):  # torch's words where a worker got SIGBUS
            raise OSError("a data worker was killed, most likely as /dev/shm is full; run the same "
                          "command again where it is larger (docker run --shm-size=8g)") from error
        raise OSError("a data worker was killed, most likely for lack of memory; run the same "
                      "command again, with fewer --num-workers") from error


class Interrupt:
    """SIGTERM and SIGINT as a flag, so that a loop can end between two steps; a second one kills,
    except under torchrun: to what a scheduler sends all processes it adds one of its own, and ends
    with SIGKILL those that take longer than 30 s.

    caught: the signal's name, or "". To be made in the main thread; `restore` ends it.
    """

    def __init__(self):
        self.caught = ""
        self.before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}

    def _catch(self, number: int, frame: object) -> None:
        self.caught = signal.Signals(number).name
        if int(os.environ.get("WORLD_SIZE", 1)) == 1:
            self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def keep_freed_memory() -> None:
    """With glibc, keep what is freed: else fetching zeroed pages again takes a tenth to a fifth of
    the time that a data worker needs for a sample."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        m_trim_threshold, m_mmap_threshold = -1, -3  # malloc.h
        libc.mallopt(m_mmap_threshold, 2**25)  # the largest that all versions take
        libc.mallopt(m_trim_threshold, 2**30)


def start_worker(worker: int = 0) -> None:
    """worker_init_fn of a DataLoader."""
    keep_freed_memory()
    outlive_signals()


def outlive_signals() -> None:
    """In a data worker: it ends when its parent says so, and only then.

    A scheduler's SIGTERM, like Ctrl-C, reaches the workers too; without them the parent could not
    finish its step. (Python's handlers do not know the sender, so a thread waits for the signal.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank; the same answer on every rank."""
    if not dist.is_initialized():
        return list(flags)
    total = torch.tensor(flags, dtype=torch.int32)  # on the CPU: by gloo, no GPU waits
    dist.all_reduce(total, dist.ReduceOp.MAX)
    return total.bool().tolist()


def cleanup() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
