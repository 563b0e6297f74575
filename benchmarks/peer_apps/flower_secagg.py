"""What Flower's SecAgg+ does with a vector, by its own functions and nothing else; run by `secagg.py` in Flower's environment.

    python flower_secagg.py CLIENTS PARAMS DROPOUTS

Prints JSON: seconds in which a client quantizes and masks, and the server unmasks. Of the server's masks a few are made and the
time multiplied, since all are alike and all of them would take minutes.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares, create_shares
from flwr.common.secure_aggregation.ndarrays_arithmetic import parameters_addition, parameters_mod, parameters_subtraction
from flwr.common.secure_aggregation.quantization import quantize
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen

_MODULUS = 1 << 32  # of their default
_CLIP, _STEPS = 8.0, 1 << 22
_MADE = 3


def seconds(do: Callable[[], object]) -> float:
    began = time.perf_counter()
    do()
    return time.perf_counter() - began


def main() -> None:
    clients, params, dropouts = map(int, sys.argv[1:])
    vector = [np.random.default_rng(1).uniform(-1, 1, params).astype(np.float32)]
    dimensions = [(params,)]
    seeds = [os.urandom(32) for _ in range(clients)]

    def masked() -> None:
        total = quantize(vector, _CLIP, _STEPS)
        total = parameters_addition(total, pseudo_rand_gen(seeds[0], _MODULUS, dimensions))
        for number, seed in enumerate(seeds[1:]):
            step = parameters_addition if number % 2 else parameters_subtraction
            total = step(total, pseudo_rand_gen(seed, _MODULUS, dimensions))
        parameters_mod(total, _MODULUS)

    total = quantize(vector, _CLIP, _STEPS)

    def unmasked() -> None:
        nonlocal total
        for seed in seeds[:_MADE]:
            total = parameters_subtraction(total, pseudo_rand_gen(seed, _MODULUS, dimensions))

    survivors, threshold = clients - dropouts, 2 * clients // 3 + 1
    shares = create_shares(seeds[0], threshold, clients)
    masks = survivors + dropouts * survivors
    told = {
        "client_s": seconds(masked),
        "server_s": seconds(unmasked) / _MADE * masks + seconds(lambda: combine_shares(shares[:threshold])) * clients,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
