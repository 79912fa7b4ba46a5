"""A small shop whose orders live in SQLite: the database that the quickstart protects.

    shop.py create DATABASE        makes the table
    shop.py write DATABASE LOG     one order per commit; notes each committed number in LOG
    shop.py drop DATABASE          the accident
    shop.py look DATABASE          prints what is there, as JSON
"""

import json
import os
import signal
import sqlite3
import sys
import time

TABLE = "orders"


def connect(path):
    database = sqlite3.connect(path, timeout=30, isolation_level=None)
    database.execute("PRAGMA journal_mode = WAL")
    # A commit that has returned is on the disk.
    database.execute("PRAGMA synchronous = FULL")
    return database


def create(path):
    connect(path).execute(
        f"CREATE TABLE {TABLE} (number INTEGER PRIMARY KEY, customer TEXT, goods BLOB)"
    )


def write(path, log_path):
    """Ends when the table is gone, or at SIGTERM, and never between a commit and its note."""
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    database = connect(path)
    log = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    number = database.execute(f"SELECT coalesce(max(number), 0) FROM {TABLE}").fetchone()[0]
    while not stop:
        number += 1
        try:
            database.execute(
                f"INSERT INTO {TABLE} VALUES (?, ?, ?)",
                (number, f"customer {number % 97}", os.urandom(200)),
            )
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                return
            raise
        os.write(log, b"%d\n" % number)
        # Others get their turn at the lock.
        time.sleep(0.002)


def drop(path):
    connect(path).execute(f"DROP TABLE {TABLE}")


def look(path):
    found = {"table": False, "rows": None, "last": None, "integrity": None}
    if os.path.exists(path):
        database = connect(path)
        query = "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND name = ?"
        found["table"] = database.execute(query, (TABLE,)).fetchone()[0] == 1
        if found["table"]:
            query = f"SELECT count(*), max(number) FROM {TABLE}"
            found["rows"], found["last"] = database.execute(query).fetchone()
        rows = database.execute("PRAGMA integrity_check").fetchall()
        found["integrity"] = "; ".join(row[0] for row in rows)
    print(json.dumps(found))


if __name__ == "__main__":
    commands = {"create": create, "write": write, "drop": drop, "look": look}
    if len(sys.argv) < 3 or sys.argv[1] not in commands:
        sys.exit(__doc__)
    commands[sys.argv[1]](*sys.argv[2:])
