"""Scores on disk, so that no text is paid for twice: across runs, between processes, and after a crash."""

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

# Written into the file's header: what tells a score cache from any other SQLite file.
_APPLICATION_ID = int.from_bytes(b"QRKs", "big")
_VERSION = 1
_SCHEMA = (
    # Who scored: `identity` is canonical JSON, `digest` its SHA-256.
    "CREATE TABLE scorers (id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, identity TEXT NOT NULL)",
    # What it read, as SHA-256; its score, NULL where it has none for good; when, in seconds since 1970.
    "CREATE TABLE scores (scorer INTEGER NOT NULL, text BLOB NOT NULL, score REAL, date INTEGER NOT NULL,"
    " PRIMARY KEY (scorer, text)) WITHOUT ROWID",
    f"PRAGMA application_id = {_APPLICATION_ID}",
    f"PRAGMA user_version = {_VERSION}",
)
_AT_A_TIME = 500  # Host parameters of a query; SQLite before 3.32 takes 999.


def digest(value: Any) -> bytes:
    """SHA-256 of the value as canonical JSON: keys sorted, no white space, ASCII.

    Raises:
        TypeError, ValueError: JSON cannot hold the value.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).digest()


class ScoreCache:
    """An SQLite file of scores, each under who gave it and what it was given for.

    Any number of processes may read and write one file at a time, on a local disk (SQLite's WAL needs shared memory,
    which a network file system does not give). Texts are kept as digests, not as text.

    Args:
        path: the file; made where there is none, its folder too.
        timeout: seconds to wait for another process that writes.

    Raises:
        UserError: the file is no score cache, is damaged, or cannot be written; it is then left as it is.
    """

    def __init__(self, path: str | os.PathLike[str], timeout: float = 60.0):
        self.path = Path(path).expanduser()
        self._scorers: dict[bytes, int] = {}
        if self.path.is_dir():
            raise UserError(f"score cache {str(self.path)!r} is a directory: want the name of a file")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"score cache {str(self.path)!r}: its folder cannot be made ({error})") from error
        with self._told():
            # One thread at a time uses it, but not always the same one: a rollout scores in a thread of its own.
            self._connection = sqlite3.connect(self.path, timeout, isolation_level=None, check_same_thread=False)
        self.close: Callable[[], None] = weakref.finalize(self, self._connection.close)
        try:
            with self._told():
                self._open(timeout)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        with self._told():
            return self._connection.execute("SELECT count(*) FROM scores").fetchone()[0]

    def get(self, identity: Mapping[str, Any], digests: Iterable[bytes]) -> dict[bytes, float | None]:
        """Of the given digests, those that are known, with their scores; None is a score that there is not.

        Args:
            identity: who scores, a dict that JSON can hold.
            digests: of what it reads.

        Raises:
            UserError: the file cannot be read.
        """
        wanted = list(digests)
        found: dict[bytes, float | None] = {}
        with self._told():
            if (scorer := self._scorer(identity)) is None:
                return found
            for start in range(0, len(wanted), _AT_A_TIME):
                some = wanted[start : start + _AT_A_TIME]
                marks = ",".join("?" * len(some))
                query = f"SELECT text, score FROM scores WHERE scorer = ? AND text IN ({marks})"
                found.update(self._connection.execute(query, (scorer, *some)).fetchall())
        return found

    def put(self, identity: Mapping[str, Any], scores: Mapping[bytes, float | None]) -> None:
        """Keep scores, by the digests of what was read; on disk when this returns. What is known already stays.

        Raises:
            UserError: the file cannot be written.
        """
        now = int(time.time())
        with self._told():
            if (scorer := self._scorer(identity)) is None:
                self._introduce(identity)
                scorer = self._scorer(identity)
            rows = [(scorer, text, score, now) for text, score in scores.items()]
            with self._transaction():
                self._connection.executemany("INSERT OR IGNORE INTO scores VALUES (?, ?, ?, ?)", rows)

    def _scorer(self, identity: Mapping[str, Any]) -> int | None:
        """The number of this identity, where it is known."""
        key = digest(identity)
        if key not in self._scorers:
            row = self._connection.execute("SELECT id FROM scorers WHERE digest = ?", (key,)).fetchone()
            if row is None:
                return None
            self._scorers[key] = row[0]
        return self._scorers[key]

    def _introduce(self, identity: Mapping[str, Any]) -> None:
        text = json.dumps(identity, sort_keys=True, ensure_ascii=False)
        command = "INSERT OR IGNORE INTO scorers (digest, identity) VALUES (?, ?)"
        self._connection.execute(command, (digest(identity), text))

    def _open(self, timeout: float) -> None:
        """Look before writing anything: a file that is not ours stays as it is."""
        if self._is_new():
            with self._transaction():
                if self._is_new():  # Still: another process may have been first.
                    for statement in _SCHEMA:
                        self._connection.execute(statement)
        if self._pragma("application_id") != _APPLICATION_ID:
            raise UserError(f"{str(self.path)!r} is an SQLite file, but no score cache: name another file")
        if self._pragma("user_version") != _VERSION:
            raise UserError(f"score cache {str(self.path)!r} is of another version of quarkrl: name another file")
        if (problem := self._pragma("quick_check(1)")) != "ok":
            raise sqlite3.DatabaseError(problem)
        self._use_wal(time.monotonic() + timeout)
        # With FULL, what is committed outlives a power cut too; a batch of scores costs more than a sync.
        self._connection.execute("PRAGMA synchronous = FULL")

    def _use_wal(self, deadline: float) -> None:
        """Readers and a writer do not wait for each other in WAL mode; the file remembers it."""
        while self._pragma("journal_mode") != "wal":
            try:
                self._pragma("journal_mode = WAL")
            except sqlite3.OperationalError:  # SQLite does not wait here for others that have the file open.
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
    def _told(self) -> Iterator[None]:
        """SQLite's errors in one line, with the file's name."""
        try:
            yield
        except sqlite3.OperationalError as error:  # Locked for too long, read-only, disk full.
            raise UserError(f"score cache {str(self.path)!r} cannot be used: {error}") from error
        except sqlite3.DatabaseError as error:
            detail = " ".join(str(error).split())
            raise UserError(
                f"{str(self.path)!r} is no score cache, or a damaged one ({detail}): move it away, or name another file"
            ) from error
