"""Files: weights in any public wrapping, CSV tables, and the one way to write a file atomically.

Public super-resolution files hold `{"params_ema": state}`, `{"params": state}` or the bare state
dict (BasicSR, official SwinIR, ESRGAN); all three are read. Nothing is ever unpickled beyond
tensors and plain containers (`weights_only=True`). A `.safetensors` file holds the bare state dict.
"""

import contextlib
import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # imported where it is needed: scripts that only read tables start faster
    import torch


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
            from safetensors.torch import load_file as load_safetensors

            return load_safetensors(path)
        damage = _damage(path)
        data = None if damage else torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path}: reading it needs: pip install safetensors") from error
    except Exception as error:  # a foreign file makes torch.load raise almost anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"{path}: not a readable weight file ({reason})") from error
    if damage:
        raise ValueError(f"{path}: damaged ({damage})")
    if not isinstance(data, dict):
        raise ValueError(f"{path}: holds a {type(data).__name__}, not a dict of weights")
    return data


def _damage(path: Path) -> str:
    """Which record of torch's zip file differs from its checksum; torch.load reads none of them.

    "" for an intact file, one without checksums (torch can write such) or of another kind. Raises
    almost anything for a broken header.
    """
    with open(path, "rb") as file:
        if file.read(4) != b"PK\x03\x04":  # torch's older format
            return ""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if not any(record.CRC for record in records):
            return ""
        # torch leaves the tensor of a record marked as a folder (MS-DOS attribute 16) unread
        folders = [record.filename for record in records if record.external_attr & 16]
        name = folders[0] if folders else archive.testzip()
    return f"{name} does not match its checksum" if name else ""


def read_state(path: str | Path) -> "dict[str, torch.Tensor]":
    """The network's state dict in a file, whatever its wrapping; EMA weights are preferred.

    A training run's `last.pt` is read as well: it keeps its EMA under "params_ema".
    """
    import torch

    data = load_file(path)
    for key in ("params_ema", "params", "state_dict"):
        if isinstance(data.get(key), dict):
            data = data[key]
            break
    if not data or not all(isinstance(v, torch.Tensor) for v in data.values()):
        raise ValueError(f"{path}: no weights found (params_ema, params or a bare state dict)")
    return {key.removeprefix("module."): value for key, value in data.items()}


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


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Context manager: write the temporary file that it yields; it then replaces `path`.

    So `path` is at every moment the old file or the complete new one. OSError names `path`, which
    the error of a write does not.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error
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


def file_digest(path: str | Path) -> str:
    """The first 12 hex digits of a file's SHA-256, as the heads of tables give it."""
    return sha256(path)[:12]


def one_line(error: BaseException, limit: int = 400) -> str:
    """An error's message on one line, its class in front unless it is a ValueError or OSError."""
    text = " ".join(str(error).split())
    if not isinstance(error, ValueError | OSError) or not text:
        text = f"{type(error).__name__}: {text}".removesuffix(": ")
    return text[:limit]


def write_csv(
    path: str | Path, header: Sequence[str], rows: Iterable[Sequence], comments: Sequence[str] = ()
) -> None:
    """Write a CSV so that `path` is at every moment the old file or the complete new one.

    comments: lines put before the header, each with "# " in front.
    """
    text = io.StringIO()
    text.writelines(f"# {line}\n" for line in comments)
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    with replacing(path) as temporary:
        temporary.write_text(text.getvalue(), encoding="utf-8")


def read_csv(
    path: Path, columns: Sequence[str] = ()
) -> tuple[list[dict[str, str]], list[str]]:
    """Rows of a CSV, and its comment lines (which begin with #). ValueError names the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such table")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        table = csv.DictReader((line for line in lines if not line.startswith("#")), strict=True)
        rows = list(table)
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV text file ({error}); make it again") from error
    if absent := [c for c in columns if c not in (table.fieldnames or ())]:
        raise ValueError(f"{path}: no column {', '.join(absent)}; make it again")
    for row in rows:
        if None in row or None in row.values():
            raise ValueError(f"{path}: row {next(iter(row.values()))!r} has too few or too many "
                             "cells; make it again")
    return rows, [line.removeprefix("#").strip() for line in lines if line.startswith("#")]
