"""What a crash must not damage: atomic files, Parquet tables and JSON."""
