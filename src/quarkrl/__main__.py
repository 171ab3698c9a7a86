"""`python -m quarkrl` is the command `quarkrl`."""

from quarkrl.cli.__main__ import command

if __name__ == "__main__":
    command()
