"""The little that several processes under torchrun need; without torchrun all of it is a no-op."""

import os
import signal
import threading
from collections.abc import Callable
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


def main_first(work: Callable[[], T]) -> T:
    """work() on rank 0, then on the others, who find what it cached."""
    main = not dist.is_initialized() or dist.get_rank() == 0
    result = work() if main else None
    gather()
    return result if main else work()


class Interrupt:
    """SIGTERM and SIGINT as a flag, so that a loop can end between two steps; a second one kills.

    caught: the signal's name, or "". To be made in the main thread; `restore` ends it.
    """

    def __init__(self):
        self.caught = ""
        self.before = {s: signal.signal(s, self._catch) for s in (signal.SIGTERM, signal.SIGINT)}

    def _catch(self, number: int, frame: object) -> None:
        self.caught = signal.Signals(number).name
        self.restore()

    def restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)


def outlive_signals(worker: int = 0) -> None:
    """worker_init_fn of a DataLoader: its workers end when their parent says so, and only then.

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


def finish() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()
