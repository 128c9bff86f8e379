"""Files: weights in any public wrapping, CSV tables, and the one way to write a file atomically.

Public super-resolution files hold `{"params_ema": state}`, `{"params": state}` or the bare state
dict (BasicSR, official SwinIR, ESRGAN); trainers add wrappings and prefixes of their own.
Nothing is ever unpickled beyond tensors, numbers and plain containers (`weights_only=True`). A
`.safetensors` file holds the bare state dict.
"""

import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import pickle
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is needed: scripts that only read tables start faster
    import torch

# Keys under which files keep a network's state dict, the preferred first
WRAPPINGS = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net_g")
SETTLED_NS = 2 * 10**9  # a file changed later than this before it was read may change unnoticed
ABANDONED_SECONDS = 3600  # age of a temporary file whose process was killed


def load_file(path: str | Path) -> dict:
    """Read a torch file, or a .safetensors file, on the CPU.

    Raises FileNotFoundError if it does not exist, ValueError if it is truncated, does not match its
    checksums, is of another kind, or holds anything but a dict of tensors and plain values.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the path of a checkpoint (.pt, .pth)")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            content = path.read_bytes()
            header, tensors = split_safetensors(content)
            stated = header.get("__metadata__", {}).get("crc32")  # of this project's files
            damage = stated and stated != f"{zlib.crc32(tensors):08x}" and "its checksum differs"
            data = None if damage else load(content)
        else:
            damage = _damage(path)
            with _numpy_numbers_allowed():
                data = None if damage else torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs: pip install safetensors") from error
    except Exception as error:  # a foreign file makes torch.load raise almost anything
        reason = one_line(error, 120)
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error):
            reason = "it holds more than tensors and numbers; save the network's state_dict alone"
        raise ValueError(f"{path}: not a readable weight file ({reason})") from error
    if damage:
        raise ValueError(f"{path}: damaged ({damage})")
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a dict of weights")
    return data


def split_safetensors(content: bytes) -> tuple[dict, bytes]:
    """The header of a .safetensors file, and what follows it: the bytes of its tensors."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def _damage(path: Path) -> str:
    """Which record of torch's zip file differs from its checksum; torch.load reads none of them.

    "" for an intact file, one without checksums (torch can write such) or of another kind. Raises
    ValueError for a zip file that is not torch's, almost anything for a broken header.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's older format
            return ""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.filename.endswith("/data.pkl") for record in records):
            raise ValueError("a zip archive without PyTorch weights; unpack it and give the file "
                             "inside")
        if not any(record.CRC for record in records):
            return ""
        # torch leaves the tensor of a record marked as a folder (MS-DOS attribute 16) unread
        folders = [record.filename for record in records if record.external_attr & 16]
        name = folders[0] if folders else archive.testzip()
    return f"{printable(name)} does not match its checksum" if name else ""


def _numpy_numbers_allowed() -> contextlib.AbstractContextManager:
    """Context manager: torch.load accepts numpy's numbers, which trainers save beside weights."""
    import numpy as np
    import torch

    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 6):  # such a file is refused
        return contextlib.nullcontext()
    scalar = np.float64(0).__reduce__()[0]
    kinds = {type(np.dtype(code)) for code in "?bBhHiIlLqQefd"}
    return torch.serialization.safe_globals([
        np.dtype, *kinds, (scalar, "numpy.core.multiarray.scalar"),  # numpy 1
        (scalar, "numpy._core.multiarray.scalar"),
    ])


def read_state(path: str | Path) -> "dict[str, torch.Tensor]":
    """The network's state dict in a file, whatever its wrapping; EMA weights are preferred.

    A training run's `last.pt` is read as well: it keeps its EMA under "params_ema". Numbers beside
    the weights are left out. Raises ValueError for a file without weights, and for weights that are
    no dense floating-point numbers.
    """
    import torch

    data = load_file(path)
    if not any(isinstance(data.get(key), dict) for key in WRAPPINGS) and "optimizers" in data:
        raise ValueError(f"{path}: a trainer's state without weights; give its network's file")
    for key in outer_keys(data):
        data = data[key]
    # torch.compile and DataParallel put a module around the network
    state = {str(key).replace("_orig_mod.", "").removeprefix("module."): value
             for key, value in data.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise ValueError(f"{path}: no weights found (params_ema, params or a bare state dict)")
    for key, value in state.items():
        whole = key.endswith(("weight", "bias")) and not value.is_floating_point()
        if value.is_meta or value.layout != torch.strided or value.is_complex() or whole:
            kind = f"{'meta' if value.is_meta else value.layout} {value.dtype}"
            raise ValueError(f"{path}: {key} is a {kind.replace('torch.', '')} tensor; save the "
                             "network's weights as dense floating-point numbers")
    return state


def outer_keys(data: dict) -> list[str]:
    """The keys around the network's state dict in a file, as ["params"]; the preferred ones."""
    keys = []
    while key := next((key for key in WRAPPINGS if isinstance(data.get(key), dict)), None):
        keys.append(key)
        data = data[key]
    return keys


def read_settings(path: str | Path) -> dict:
    """The settings that a training run recorded beside its weights; {} for a public file."""
    settings = load_file(path).get("settings")
    return settings if isinstance(settings, dict) else {}


def not_finite(state: dict, path: tuple = ()) -> str | None:
    """Dotted name of the first tensor in nested dicts that holds a NaN or an infinity, or None."""
    import torch

    for key, value in state.items():
        name = (*path, str(key))
        if isinstance(value, dict):
            if found := not_finite(value, name):
                return found
        elif isinstance(value, torch.Tensor) and not value.isfinite().all():
            return ".".join(name)
    return None


def check_finite(state: dict, subject: str | Path) -> None:
    """ValueError, `subject` and the weight's name, unless all tensors of a state are finite."""
    if name := not_finite(state):
        raise ValueError(f"{subject}: {name} is not finite")


def lock(file: IO, wait: bool = False) -> bool | None:
    """Lock a file that is open for writing until this process ends; False if another one has it.

    Workers do not inherit the lock. None on a system without locks (Windows, some network disks).
    """
    try:
        import fcntl

        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except (ImportError, OSError):
        return None
    return True


@contextlib.contextmanager
def errors_named(path: str | Path) -> Iterator[None]:
    """OSError with the file's name, which the error of a write does not have."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context manager: write the temporary file that it yields; it then replaces `path`.

    So `path` is at every moment the old file or the complete new one. OSError names `path`. What a
    killed process has left of an earlier attempt is removed after an hour.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the file's name, which may already be as long as the system allows
    stem = f".{zlib.crc32(os.fsencode(path.name)):08x}"
    for other in path.parent.glob(f"{stem}.*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - other.stat().st_mtime > ABANDONED_SECONDS:
                other.unlink()
    temporary = path.with_name(f"{stem}.{os.getpid()}.tmp")
    try:
        with errors_named(path):
            yield temporary
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_atomic(obj: dict, path: str | Path) -> None:
    """torch.save so that `path` is at every moment the old file or the complete new one."""
    import torch

    buffer = io.BytesIO()
    torch.save(obj, buffer)  # straight to a full disk, it would raise anything but an OSError
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(buffer.getbuffer())
        file.flush()
        os.fsync(file.fileno())


def sha256(path: str | Path) -> str:
    """Hex digits of a file's SHA-256."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def file_stamp(stat: os.stat_result) -> tuple[int, int, int, int]:
    """What tells that a file was touched: size, time of content, time of anything, inode."""
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino


def is_settled(stamp: tuple[int, int, int, int], now_ns: int) -> bool:
    """Whether a file's last change lies so far back that the next one gets another time."""
    return now_ns - max(stamp[1:3]) > SETTLED_NS


def file_digest(path: str | Path) -> str:
    """The first 12 hex digits of a file's SHA-256, as the heads of tables give it."""
    return sha256(path)[:12]


def name_and_digest(path: str | Path) -> str:
    """A file as tables and cards name it."""
    return f"{Path(path).name} sha256 {file_digest(path)}"


def one_line(error: BaseException, limit: int = 400) -> str:
    """An error's message on one line, its class in front unless it is a ValueError or OSError."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return printable(text[:limit])


def printable(text: str) -> str:
    """The text with control characters, which could steer a terminal, and half characters, which
    cannot be printed, as escapes; line ends stay."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode()
                   for c in text)


def read_text(path: str | Path, errors: str = "strict") -> str:
    """A text file in UTF-8 or, by its mark, UTF-16; lines end as they do in the file.

    Raises ValueError naming a file of another encoding, FileNotFoundError if there is none.
    """
    data = Path(path).read_bytes()
    utf_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf_16 else "utf-8-sig", errors)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text file in UTF-8 ({error})") from error


def write_csv(
    path: str | Path, header: Sequence[str], rows: Iterable[Sequence], comments: Sequence[str] = ()
) -> None:
    """Write a CSV so that `path` is at every moment the old file or the complete new one.

    comments: lines put before the header, each with "# " in front.
    """
    text = io.StringIO()
    text.writelines(f"# {' '.join(line.splitlines())}\n" for line in comments)
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(path) as temporary:  # names of files may be no UTF-8
        temporary.write_bytes(text.getvalue().encode("utf-8", "surrogateescape"))


def parse_csv(path: Path) -> tuple[list[str], list[dict[str, str | None]], list[str]]:
    """Header and rows of a CSV, and the comment lines (which begin with #) above its header.

    A row that is too short has None for the absent cells, one that is too long a key None. Raises
    ValueError naming a file that is no CSV.
    """
    text, comments = read_text(path, "surrogateescape"), []
    while text.startswith("#"):
        line, _, text = text.partition("\n")
        comments.append(line.removeprefix("#").strip())
    try:
        table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        return [*(table.fieldnames or ())], list(table), comments
    except csv.Error as error:
        raise ValueError(f"{path}: not a CSV text file ({error}); make it again") from error


def read_csv(
    path: Path, columns: Sequence[str] = ()
) -> tuple[list[dict[str, str]], list[str]]:
    """Rows and comment lines of one of our tables.

    Raises ValueError naming a file that is no CSV, lacks one of the columns or has gaps.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    header, rows, comments = parse_csv(path)
    if absent := [c for c in columns if c not in header]:
        raise ValueError(f"{path}: no column {', '.join(absent)}; make it again")
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {next(iter(row.values()))!r} has too few or too many "
                             "cells; make it again")
    return rows, comments
