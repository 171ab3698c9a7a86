"""`ScoreCache`: an SQLite file of scores, shared by runs and processes, which survives a crash."""

import hashlib
import json
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from quarkrl.errors import UserError

# In the file's header; distinguishes a score cache from other SQLite files.
_APPLICATION_ID = int.from_bytes(b"QRKs", "big")
_VERSION = 1
_SCHEMA = (
    # The rewards: `identity` is canonical JSON, `digest` its SHA-256.
    "CREATE TABLE scorers (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, identity TEXT NOT NULL)",
    # `text`: SHA-256 of the arguments that the reward reads. `score`: NULL if the text has none. `date`: Unix time.
    "CREATE TABLE scores (scorer INTEGER NOT NULL, text BLOB NOT NULL, score REAL, date INTEGER NOT NULL,"
    " PRIMARY KEY (scorer, text)) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)
_REMEDY = "Move the file away, or name another file."
_PARAMETERS_PER_QUERY = 500  # SQLite before 3.32 allows 999.


def digest(value: Any) -> bytes:
    """Return the SHA-256 of a value as canonical JSON: sorted keys, no white space, ASCII.

    Raises:
        TypeError, ValueError: the value is not JSON-able.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()


class ScoreCache:
    """An SQLite file of scores, keyed by the reward's identity and the digest of the arguments that it read.

    Several processes may read and write one file concurrently, on a local disk. SQLite's WAL needs shared memory, which
    a network file system does not provide. The file holds digests, not texts.

    Args:
        path: the file. It is created if it does not exist, with its folder.
        timeout: seconds to wait while another process writes.

    Raises:
        UserError: the file is not a score cache, is damaged, or cannot be written. It is not modified then.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 60.0):
        self.path = Path(path).expanduser().absolute()
        self._scorers: dict[bytes, int] = {}
        if self.path.is_dir():
            raise UserError(f"score_cache {str(self.path)!r}: must be a file, not a directory.")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"score_cache {str(self.path)!r}: cannot create its folder ({error}).") from error
        with self._one_line_errors():
            # One thread uses the connection at a time, but not always the same one.
            self._connection = sqlite3.connect(self.path, timeout, isolation_level=None, check_same_thread=False)
        self.close: Callable[[], None] = weakref.finalize(self, self._connection.close)
        try:
            with self._one_line_errors():
                self._open(timeout)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        with self._one_line_errors():
            return self._connection.execute("SELECT count(*) FROM scores").fetchone()[0]

    def get(self, identity: Mapping[str, Any], digests: Iterable[bytes]) -> dict[bytes, float | None]:
        """Return the scores that are in the file, by digest; None is a text that has no score.

        Args:
            identity: the reward's identity, a JSON-able dict.
            digests: the digests of the arguments that the reward reads.

        Raises:
            UserError: the file cannot be read.
        """
        keys = list(digests)
        scores: dict[bytes, float | None] = {}
        with self._one_line_errors():
            if (scorer := self._scorer(identity)) is None:
                return scores
            for start in range(0, len(keys), _PARAMETERS_PER_QUERY):
                part = keys[start : start + _PARAMETERS_PER_QUERY]
                marks = ",".join("?" * len(part))
                query = f"SELECT text, score FROM scores WHERE scorer = ? AND text IN ({marks})"
                scores.update(self._connection.execute(query, (scorer, *part)).fetchall())
        return scores

    def put(self, identity: Mapping[str, Any], scores: Mapping[bytes, float | None]) -> None:
        """Commit scores, by digest, to the disk. A score that is already in the file is not replaced.

        Raises:
            UserError: the file cannot be written.
        """
        now = int(time.time())
        with self._one_line_errors():
            if (scorer := self._scorer(identity)) is None:
                self._insert_scorer(identity)
                scorer = self._scorer(identity)
            rows = [(scorer, text, score, now) for text, score in scores.items()]
            with self._transaction():
                self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)

    def _scorer(self, identity: Mapping[str, Any]) -> int | None:
        """The row id of this identity, or None if it is not in the file."""
        key = digest(identity)
        if key not in self._scorers:
            row = self._connection.execute("SELECT id FROM scorers WHERE digest = ?", (key,)).fetchone()
            if row is None:
                return None
            self._scorers[key] = row[0]
        return self._scorers[key]

    def _insert_scorer(self, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        command = "INSERT OR IGNORE INTO scorers (digest, identity) VALUES (?, ?)"
        self._connection.execute(command, (digest(identity), text))

    def _open(self, timeout: float) -> None:
        """Create the tables or check the file. A file that is not a score cache is not modified."""
        if self._is_new():
            with self._transaction():
                if self._is_new():  # Check again: another process may have been first.
                    for statement in _SCHEMA:
                        self._connection.execute(statement)
        if self._pragma("application_id") != _APPLICATION_ID:
            raise UserError(f"score_cache {str(self.path)!r}: must be a score cache, not other SQLite data. {_REMEDY}")
        if self._pragma("user_version") != _VERSION:
            raise UserError(f"score_cache {str(self.path)!r}: must be of this version of quarkrl. {_REMEDY}")
        if (problem := self._pragma("quick_check(1)")) != "ok":
            raise sqlite3.DatabaseError(problem)
        self._use_wal(time.monotonic() + timeout)
        # FULL: committed scores survive a power failure. A sync costs less than a batch of scores.
        self._connection.execute("PRAGMA synchronous = FULL")

    def _use_wal(self, deadline: float) -> None:
        """Switch the file to WAL mode for good, in which readers and a writer do not block each other."""
        while self._pragma("journal_mode") != "wal":
            try:
                self._pragma("journal_mode = WAL")
            except sqlite3.OperationalError:  # SQLite does not wait here for other processes that have the file open.
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def _is_new(self) -> bool:
        tables = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        return not tables and self._pragma("application_id") == 0

    def _pragma(self, text: str) -> Any:
        return self._connection.execute(f"PRAGMA {text}").fetchone()[0]

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:
                self._connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        """Turn SQLite's errors into a `UserError` of one line with the file's name."""
        try:
            yield
        except sqlite3.OperationalError as error:  # Locked for too long, read-only, disk full.
            raise UserError(f"score_cache {str(self.path)!r}: cannot use the file ({error}).") from error
        except sqlite3.DatabaseError as error:
            detail = " ".join(str(error).split())
            raise UserError(
                f"score_cache {str(self.path)!r}: must be an undamaged score cache ({detail}). {_REMEDY}"
            ) from error
