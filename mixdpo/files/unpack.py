"""Opens a file as bytes; a .gz or .zst file is unpacked on the way.

zstd needs the package zstandard, or Python 3.14, which has its own module. Left out: bz2, xz, zip.
"""

import contextlib
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from mixdpo.config import InputError

PIECE = 2048  # packed bytes that are unpacked at once: zstd may turn each byte into some thousand


@contextlib.contextmanager
def unpacked(path) -> Iterator[BinaryIO]:
    """The (unpacked) bytes of a file. Raises: InputError if the file is missing, is a folder, is not a complete gzip or
    zstd file, or if the package for zstd is missing."""
    if Path(path).is_dir():
        raise InputError("is a folder; wanted a file, such as .jsonl or .jsonl.gz", file=path)
    if not Path(path).is_file():
        raise InputError("no such file; wanted preferences, such as .jsonl or .jsonl.gz", file=path)
    kind: str = Path(path).suffix
    opener: Callable
    opener, *damage = ((gzip.open, EOFError, gzip.BadGzipFile, zlib.error) if kind == ".gz" else
                       zstd_opener(path) if kind == ".zst" else (open,))
    with opener(path, "rb") as file:
        try:
            yield file
        except tuple(damage) as error:
            raise InputError(f"is not a complete {kind} file ({error}); compress it again, or remove {kind} "
                             "from the name of a plain file", file=path) from None


def zstd_opener(path) -> tuple:
    """A function like open for zstd files, and the errors that damage raises. Raises: InputError without a library."""
    try:
        from compression import zstd  # Python 3.14

        return zstd.open, zstd.ZstdError, EOFError
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise InputError("zstd needs a package; run `pip install -e .[files]`, or unpack the file with `unzstd`",
                         file=path) from None
    return (lambda path, mode: io.BufferedReader(Frames(open(path, mode), zstandard.ZstdDecompressor), 1 << 16),
            zstandard.ZstdError, EOFError)


class Frames(io.RawIOBase):
    """The unpacked bytes of all frames of a zstd file. zstandard's own reader stops after the first frame, and takes a
    truncated file for a complete one. Raises EOFError there."""

    def __init__(self, file, decompressor):
        self.file, self.decompressor = file, decompressor
        self.frame, self.left = None, b""                                   # of zstandard; bytes that wait to be read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self.left:
            packed = self.frame.unused_data if self.frame is not None and self.frame.eof else b""
            packed = packed or self.file.read(PIECE)
            if not packed:
                if self.frame is not None and not self.frame.eof:
                    raise EOFError("it ends within a frame")
                return 0
            if self.frame is None or self.frame.eof:
                self.frame = self.decompressor().decompressobj()
            self.left = self.frame.decompress(packed)
        count = min(len(buffer), len(self.left))
        buffer[:count], self.left = self.left[:count], self.left[count:]
        return count

    def close(self) -> None:
        self.file.close()
        super().close()
