"""The access log: a file that several processes append to, rotated by whichever of them finds it too large first."""

from __future__ import annotations

import fcntl
import os
from logging.handlers import RotatingFileHandler

MAX_LOG_BYTES, MAX_LOG_FILES = 64 * 2**20, 4


class AccessLog(RotatingFileHandler):
    """Appends lines to a file. When another process has rotated it, the new file is opened instead of rotating again."""

    def __init__(self, file: str, max_bytes: int = MAX_LOG_BYTES) -> None:
        super().__init__(file, maxBytes=max_bytes, backupCount=MAX_LOG_FILES)

    def doRollover(self) -> None:
        """Rotate the file, or open the one that another process has started."""
        folder, name = os.path.split(self.baseFilename)
        with open(os.path.join(folder, f".{name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if (self.stream and not os.path.exists(self.baseFilename)) or (
                self.stream and not os.path.samestat(os.fstat(self.stream.fileno()), os.stat(self.baseFilename))
            ):
                self.stream.close()
            else:
                super().doRollover()
                return
        self.stream = self._open()
