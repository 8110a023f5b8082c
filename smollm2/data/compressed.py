"""Files that may be compressed, opened for reading."""

import gzip
import io
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, cast

from smollm2.data.text import BLOCK, open_plain
from smollm2.errors import ConfigError

INSTALL = "run `pip install 'smollm2-training[data]'`"


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file for reading, decompressed if its name ends in .gz or .zst. Raise ConfigError without zstandard."""
    ending = path.suffix.lower()
    if ending == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if ending != ".zst":
        return open_plain(path)
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ConfigError(path, "zstd files are read with zstandard, which is not installed", INSTALL) from None
    return cast(IO[bytes], io.BufferedReader(ZstdFile(path.open("rb"), zstandard.ZstdDecompressor), BLOCK))


class ZstdFile(io.RawIOBase):
    """A zstd file of any number of frames. zstandard's own reader takes a truncated file for a complete one."""

    def __init__(self, file: IO[bytes], make_decompressor: Callable[[], Any]) -> None:
        self.file, self.make_decompressor = file, make_decompressor
        self.frame, self.held = make_decompressor().decompressobj(), b""
        self.is_begun = False

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read decompressed bytes into `buffer`; return their number. Raise OSError if the file is damaged."""
        while not self.held:
            if self.frame.eof:
                data = self.frame.unused_data
                self.frame, self.is_begun = self.make_decompressor().decompressobj(), bool(data)
            else:
                data = b""
            data = data or self.file.read(BLOCK)
            if not data and self.is_begun:
                raise OSError("the compressed data is truncated")
            if not data:
                return 0
            self.is_begun = True
            try:
                self.held = self.frame.decompress(data)
            except Exception as error:  # zstandard.ZstdError, whose module is optional
                raise OSError(str(error)) from None
        count = min(len(buffer), len(self.held))
        buffer[:count], self.held = self.held[:count], self.held[count:]
        return count

    def close(self) -> None:
        """Close the file."""
        self.file.close()
        super().close()
