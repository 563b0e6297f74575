"""What training without federation gives: run as a module, prints the metrics on the test set as one JSON object.

    python -m choral_deploy.baseline TASK TEST_SET ROUNDS SEED HOLDOUT SHARD [SHARD …]

One shard: a device alone. Several: all data in one place, as nobody may do with real data. The examples trained on, the
hyper-parameters, the initial weights and the number of epochs are those of a federated run of so many rounds.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from choral.evaluation import evaluate
from choral.standardize import standardize_of
from choral.statistics import Moments, merge_all
from choral.task import Task, load_task
from choral_client.data import load_shard
from choral_client.train import fit
from torch.utils.data import ConcatDataset, TensorDataset


def train(task: Task, shards: Sequence[Path], test_set: Path, rounds: int, seed: int, holdout: float) -> dict[str, float]:
    """Train on the shards together and measure on the test set; metrics by name."""
    parts = [load_shard(task, path, holdout) for path in shards]
    model = task.initial_model(seed)
    standardize = standardize_of(model)
    if standardize is not None:
        standardize.fill(merge_all(Moments.of(part.features().numpy()) for part in parts))
    datasets = [part.training for part in parts]
    tensors = [dataset.tensors for dataset in datasets if isinstance(dataset, TensorDataset)]
    together = TensorDataset(*map(torch.cat, zip(*tensors, strict=True))) if len(tensors) == len(parts) else ConcatDataset(datasets)
    training = task.training.model_copy(update={"epochs": task.training.epochs * rounds})
    fit(task, model, together, training, seed)
    return {metric.name: metric.value for metric in evaluate(task, model, task.examples(test_set))}


def main() -> None:
    """Read the command line, train, print."""
    task, test_set, rounds, seed, holdout, *shards = sys.argv[1:]
    torch.set_num_threads(1)
    measured = train(load_task(task), [Path(s) for s in shards], Path(test_set), int(rounds), int(seed), float(holdout))
    print(json.dumps(measured))  # noqa: T201


if __name__ == "__main__":
    main()
