from __future__ import annotations

from hypothesis import settings

# A shared machine may stall any single example: how long one takes says nothing about the code.
settings.register_profile("choral", deadline=None, print_blob=True)
settings.load_profile("choral")
