"""Backups: all records and versions in one file, and back from it."""
