"""The file of requests: lines of several processes, put aside when it has grown, by whichever of them comes to it first."""

from __future__ import annotations

import fcntl
import os
from logging.handlers import RotatingFileHandler

LOG_BYTES, LOG_FILES = 64 * 2**20, 4


class AccessLog(RotatingFileHandler):
    """Appends lines to a file. One that another process has put aside is left for the new one, and not put aside again."""

    def __init__(self, file: str, most_bytes: int = LOG_BYTES) -> None:
        super().__init__(file, maxBytes=most_bytes, backupCount=LOG_FILES)

    def doRollover(self) -> None:
        """Begin a new file, or go on with the one that another process has begun."""
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
