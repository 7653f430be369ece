"""One process of test_all_reduce.py: `python all_reduce_process.py COORDINATOR PROCESSES PROCESS` prints what it got, as JSON."""

import json
import sys
import threading
from typing import Any

import jax
import numpy as np

import embax


def problem():
    """Placed specs for four devices and a global batch, of which only the last samples are beyond a limit."""
    table = embax.TableSpec(
        name="t",
        vocabulary_size=4000,
        embedding_dim=8,
        initializer=jax.nn.initializers.zeros,
        optimizer=embax.SGDOptimizerSpec(0.1),
        combiner="sum",
        max_ids_per_partition=16,
        max_unique_ids_per_partition=16,
    )
    specs = [embax.FeatureSpec(name="f", table_spec=table, input_shape=(256, 4), output_shape=(256, 8))]
    ids = np.arange(256 * 4).reshape(256, 4)
    ids[-20:] = np.arange(80).reshape(20, 4) * 16
    return embax.prepare_feature_specs_for_training(specs, 4, 4), [ids]


def summary(packed, device: int) -> list[Any]:
    """The number of minibatches, and row pointers and ids of one local device as far as they are written."""
    layout, number = packed.layout, int(packed.num_minibatches[device])
    pointers = packed.row_pointers.reshape(layout.num_local_devices, -1)[device, : 4 * number * 16]
    ids = packed.embedding_ids.reshape(layout.num_local_devices, -1)[device, : pointers[-1]]
    return [number, pointers.tolist(), ids.tolist()]


def pack(process: int) -> list[Any]:
    """This process packs its part of the batch, for its two devices."""
    specs, (ids,) = problem()
    options = {"limits": "raise", "enable_minibatching": True, "all_reduce": embax.DistributedAllReduce()}
    packed = embax.preprocess([ids[128 * process : 128 * process + 128]], specs=specs, **options)
    return [summary(packed, 0), summary(packed, 1)]


def attempt(reduce, key: int, value: int) -> Any:
    """The result, or the text of the error."""
    try:
        return reduce.bitwise_or(key, value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(coordinator: str, processes: int, process: int) -> None:
    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=60)
    assert (jax.process_count(), jax.local_device_count()) == (processes, 2)
    reduce = embax.DistributedAllReduce()
    results = {
        "small": attempt(reduce, 0, 1 << process),
        "large": attempt(reduce, 1, (1 << 63) | (1 << (32 + process)) | process),
        "zero": attempt(reduce, 2**63 - 1, 0),
        "many": [attempt(reduce, key, 2 * key + process) for key in range(2, 12)],
        "keys differ": attempt(reduce, 100 + process * 2**40, 1),
        "afterwards": attempt(reduce, 101, 4 + process),
        "packed": pack(process),
    }
    thread = threading.Thread(target=lambda: results.update(thread=attempt(reduce, 200, 1)), name="prefetch")
    thread.start()
    thread.join()
    print(json.dumps(results), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
