"""The `choral` command."""
