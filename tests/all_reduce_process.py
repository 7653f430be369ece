"""One process of test_all_reduce.py: `python all_reduce_process.py COORDINATOR PROCESSES PROCESS` prints what it got, as JSON."""

import json
import sys
import threading
from typing import Any

import jax

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_cpu_collectives_implementation", "gloo")

from embax import DistributedAllReduce  # noqa: E402


def attempt(reduce, key: int, value: int) -> Any:
    """The result, or the text of the error."""
    try:
        return reduce.bitwise_or(key, value)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(coordinator: str, processes: int, process: int) -> None:
    jax.distributed.initialize(coordinator, processes, process, initialization_timeout=60)
    assert (jax.process_count(), jax.local_device_count()) == (processes, 2)
    reduce = DistributedAllReduce()
    results = {
        "small": attempt(reduce, 0, 1 << process),
        "large": attempt(reduce, 1, (1 << 63) | (1 << (32 + process)) | process),
        "zero": attempt(reduce, 2**63 - 1, 0),
        "many": [attempt(reduce, key, 2 * key + process) for key in range(2, 12)],
        "keys differ": attempt(reduce, 100 + process * 2**40, 1),
        "afterwards": attempt(reduce, 101, 4 + process),
    }
    thread = threading.Thread(target=lambda: results.update(thread=attempt(reduce, 200, 1)), name="prefetch")
    thread.start()
    thread.join()
    print(json.dumps(results), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
