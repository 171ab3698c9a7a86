"""What a crash must not damage: atomic files and directories, Parquet tables with checksums, and JSON."""
