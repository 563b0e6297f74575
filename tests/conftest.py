"""What all tests share: the harness that starts real processes can be imported as `e2e.federation`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
