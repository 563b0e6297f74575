from __future__ import annotations

from hypothesis import settings
from server.databases import database_url, postgres
from server.disks import small_disk
from server.object_store import bucket_url, object_store

__all__ = ["bucket_url", "database_url", "object_store", "postgres", "small_disk"]

# A shared machine may stall any single example: how long one takes says nothing about the code.
settings.register_profile("choral", deadline=None, print_blob=True)
settings.load_profile("choral")
