"""`python -m quarkrl` is the command `quarkrl`."""

from quarkrl.cli.main import command

if __name__ == "__main__":
    command()
