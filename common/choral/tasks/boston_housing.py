"""Boston housing: the median value of homes in 506 census tracts, from 13 features (Harrison & Rubinfeld 1978).

Where the data comes from, and why its column B should not be used for anything but reproducing old results: data/README.md.
"""

from __future__ import annotations

from torch import nn
from torch.nn.functional import l1_loss, mse_loss

from choral import Standardize, Table, Task, Training

FEATURES = ("CRIM", "ZN", "INDUS", "CHAS", "NOX", "RM", "AGE", "DIS", "RAD", "TAX", "PTRATIO", "B", "LSTAT")


_SHARE, _MILES = (0.0, 100.0), (1.0, 13.0)  # per cent
_RANGES = {  # of what such a number can be, from its definition
    "CRIM": _SHARE,
    "ZN": _SHARE,
    "INDUS": (0.0, 30.0),
    "CHAS": (0.0, 1.0),
    "NOX": (0.3, 1.0),
    "RM": (3.0, 9.0),
    "AGE": _SHARE,
    "DIS": _MILES,
    "RAD": (1.0, 24.0),
    "TAX": (150.0, 750.0),
    "PTRATIO": (12.0, 23.0),
    "B": (0.0, 400.0),
    "LSTAT": (0.0, 40.0),
}


def network() -> nn.Module:
    """13 → 32 → 24 → 16 → 1. CHAS is a 0/1 column and stays as it is."""
    return nn.Sequential(
        Standardize(len(FEATURES), keep=[FEATURES.index("CHAS")]),
        *(nn.Linear(13, 32), nn.ReLU()),
        *(nn.Linear(32, 24), nn.ReLU()),
        *(nn.Linear(24, 16), nn.ReLU()),
        nn.Linear(16, 1),
    )


task = Task(
    name="boston_housing",
    model=network,
    loss=mse_loss,
    metrics={"mse": mse_loss, "mae": l1_loss},
    load=Table(FEATURES, target="MEDV"),
    ranges=[_RANGES[feature] for feature in FEATURES],
    training=Training(epochs=5, batch_size=8, learning_rate=0.001),
)
