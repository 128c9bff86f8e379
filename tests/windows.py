"""Take from this Python what Windows's lacks, so that a test sees who needs it.

    import windows    # first; then the project's own modules

The packages are imported before: on Linux they rightly use what is there.
"""

import os
import signal
import sys

import cv2  # noqa: F401
import numpy  # noqa: F401
import PIL.Image  # noqa: F401
import scipy.ndimage  # noqa: F401
import scipy.stats  # noqa: F401
import torch.distributed  # noqa: F401
import torch.nn.utils.parametrize  # noqa: F401
import torch.optim  # noqa: F401
import torch.utils.checkpoint  # noqa: F401
import torch.utils.data  # noqa: F401
import tqdm  # noqa: F401

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "readline", "resource", "syslog", "termios",
           "tty")
OS = ("chown", "chroot", "fchdir", "fchown", "fork", "forkpty", "fdatasync", "getegid", "geteuid",
      "getgid", "getgroups", "getloadavg", "getpgid", "getpgrp", "getpriority", "getsid", "getuid",
      "killpg", "lchown", "mkfifo", "mknod", "nice", "posix_fadvise", "posix_fallocate", "pread",
      "pwrite", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setpgid", "setpgrp",
      "setpriority", "setsid", "setuid", "statvfs", "sync", "sysconf", "uname", "wait", "wait3")
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
FUNCTIONS = ("alarm", "pause", "pthread_kill", "pthread_sigmask", "setitimer", "siginterrupt",
             "sigpending", "sigtimedwait", "sigwait", "sigwaitinfo")

for name in MODULES:
    sys.modules[name] = None  # importing it raises ImportError
for name in OS:
    delattr(os, name)
for name in {n for n in dir(signal) if n.startswith("SIG")} - SIGNALS | {*FUNCTIONS}:
    delattr(signal, name)
