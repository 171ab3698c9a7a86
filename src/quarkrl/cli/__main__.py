"""`python -m quarkrl.cli` is the command `quarkrl`."""

from quarkrl.__main__ import command

if __name__ == "__main__":
    command()
