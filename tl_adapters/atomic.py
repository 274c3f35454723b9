"""Write all of it or nothing: to a temporary name beside the goal, then rename."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tl_adapters.errors import UserError


class FolderExistsError(UserError, FileExistsError):
    """A folder that would have to be overwritten; nothing is."""


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A fresh folder to fill; it becomes ``path`` when the block ends well and vanishes when it does not.

    Raises FolderExistsError where ``path`` exists already.
    """
    path = Path(path)
    if path.exists():
        raise FolderExistsError(f"{path} exists already; choose another name or remove it first.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)  # mkdtemp makes folders for the owner alone
        os.replace(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file; whoever reads ``path`` sees the old text or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
