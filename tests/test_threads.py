"""The same bits on any number of threads, where these could differ: numbers below the smallest normal one."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import sys, numpy as np, jax, embax

tiny = 2e-38  # Half of it is subnormal: zero where XLA computes, and not where Python does.
specs = embax.prepare_feature_specs_for_training({
    "f": embax.FeatureSpec(
        name="f", input_shape=(16384, 2), output_shape=(16384, 64),
        table_spec=embax.TableSpec(
            name="t", vocabulary_size=4096, embedding_dim=64, combiner="sum",
            initializer=jax.nn.initializers.constant(tiny), optimizer=embax.SGDOptimizerSpec(learning_rate=1.0)))},
    1, 4)
variables = embax.init_embedding_variables(jax.random.key(0), specs)
ids = np.repeat(np.arange(16384, dtype=np.int32)[:, None] % 4096, 2, axis=1)
look_up = jax.jit(lambda variables, packed: embax.lookup(packed, variables, specs=specs)["f"])

def pack(weights, samples):
    weights = np.tile(np.float32(weights), (samples, 1))
    return embax.preprocess({"f": ids[:samples]}, {"f": weights}, specs=specs, limits="grow")

def lookup():  # Of so few ids that packing them starts no thread.
    return int(np.count_nonzero(np.asarray(look_up(variables, pack([0.25, 0.25], 2048))).view(np.int32)))

def packing():  # Gains of equal ids of a sample are added.
    packed = pack([tiny, -0.6 * tiny], 16384)
    ids, gains, ends = (array.reshape(4, -1) for array in (packed.embedding_ids, packed.gains, packed.row_pointers))
    # What lies behind the last partition of a SparseCore is not written.
    written = (ids != 2**31 - 1) & (np.arange(ids.shape[1]) < ends[:, -1:])
    return int(np.count_nonzero(gains[written].view(np.int32)))

parts = {"lookup": lookup, "packing": packing}
print([[parts[name]() for _ in range(5)] for name in sys.argv[1:]])
"""


@pytest.mark.parametrize("order", [("lookup", "packing"), ("packing", "lookup")])
def test_subnormal_numbers_are_the_same_on_any_number_of_threads(order):
    # In processes of their own: the number of threads is read once, and which call starts them matters.
    found = []
    for threads in ("1", "2"):
        command = [sys.executable, "-c", PROGRAM, *order]
        environment = os.environ | {"EMBAX_NUM_THREADS": threads, "JAX_PLATFORMS": "cpu"}
        run = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
        found.append(json.loads(run.stdout))
    assert found[0] == found[1]
    assert found[0][order.index("packing")] == [16384] * 5
