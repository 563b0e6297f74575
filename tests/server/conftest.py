from __future__ import annotations

from hypothesis import settings
from server.databases import database_url, postgres

__all__ = ["database_url", "postgres"]

# A shared machine may stall any single example: how long one takes says nothing about the code.
settings.register_profile("choral", deadline=None, print_blob=True)
settings.load_profile("choral")
