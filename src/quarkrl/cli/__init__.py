"""The command `quarkrl`: one file per subcommand."""
