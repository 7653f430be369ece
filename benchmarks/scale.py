"""What a step on many devices exchanges and holds: a model, checked against compiled programs, and carried to 1,024 devices.

The model counts bytes from the layout of a packed batch alone. Programs for 2, 4 and 8 devices are compiled, not run, and
their collectives and temporary memory compared with it. For more devices the batch of one of them is packed, with ids drawn
from the tables of all.

Run it with: python -m benchmarks.scale
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

import embax
from benchmarks.results import write_section
from embax._ops.exchange import rows_per_round
from embax._preprocess.buffers import PreprocessedInput
from embax._preprocess.packer import Packer
from embax._stacking.plan import make_plan

COMPILED = (2, 4, 8)
CARRIED = (16, 64, 256, 1024)

LINK_BYTES_PER_S = 25e9
"""Assumed: what a device sends to the others a second, in each direction; a network of 200 Gbit/s."""
ROW_BYTES_PER_S = 10e9
"""Assumed: random reads and writes of rows in memory, what this project measured on two CPU cores."""
LATENCY_S = 20e-6
"""Assumed: of one collective operation."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One table of `dim` columns whose rows, like the batch, grow with the devices.

    Args:
        name: of the setting.
        dim: columns.
        batch: samples of a device.
        valency: ids of a sample.
        rows: of the table, for each device.
        sparsecores: of a device.
        exponent: of the power law that ids are drawn from; None draws them uniformly.
    """

    name: str
    dim: int
    batch: int
    valency: int
    rows: int
    sparsecores: int
    exponent: float | None = None

    def specs(self, num_devices: int) -> dict[str, embax.FeatureSpec]:
        """Placed features."""
        table = embax.TableSpec(
            name="table",
            vocabulary_size=self.rows * num_devices,
            embedding_dim=self.dim,
            initializer=jax.nn.initializers.zeros,
            optimizer=embax.AdagradOptimizerSpec(0.01),
            combiner="sum",
        )
        batch = self.batch * num_devices
        feature = embax.FeatureSpec(
            name="ids", table_spec=table, input_shape=(batch, self.valency), output_shape=(batch, self.dim)
        )
        return embax.prepare_feature_specs_for_training({"ids": feature}, num_devices, self.sparsecores)

    def ids(self, num_devices: int, num_local_devices: int) -> np.ndarray:
        """int64[batch, valency] of some devices."""
        rng = np.random.default_rng(0)
        rows, shape = self.rows * num_devices, (self.batch * num_local_devices, self.valency)
        if self.exponent is None:
            return rng.integers(0, rows, shape)
        # The inverse of the integral of x^-exponent from 1 to rows + 1; multiplied by a prime, frequent ids lie anywhere.
        power = 1.0 - self.exponent
        ranks = (1.0 + rng.random(shape) * ((rows + 1.0) ** power - 1.0)) ** (1.0 / power) - 1.0
        return ranks.astype(np.int64) * 2_147_483_647 % rows

    def packed(
        self, num_devices: int, num_local_devices: int
    ) -> tuple[dict[str, embax.FeatureSpec], PreprocessedInput]:
        """The batch of some devices, in buffers that hold it and no more."""
        specs, ids = self.specs(num_devices), {"ids": self.ids(num_devices, num_local_devices)}
        counted = Packer(specs, limits="drop", num_local_devices=num_local_devices)(ids).stats
        embax.update_preprocessing_parameters(specs, counted)
        return specs, Packer(specs, limits="raise", num_local_devices=num_local_devices)(ids)


SETTINGS = (
    Setting("uniform", 32, 4096, 26, 1_000_000, 4),
    Setting("power law 1.05", 32, 4096, 26, 1_000_000, 4, 1.05),
    Setting("uniform, 1 SparseCore", 32, 4096, 26, 1_000_000, 1),
)


@dataclasses.dataclass(frozen=True)
class Model:
    """What one device does in a step of one round, beside what it would do alone.

    Args:
        num_devices: that the table is sharded over.
        ids: distinct rows that it names.
        size: rows that it sends to each device in a round.
        row_bytes: of a row.
        entries: of its packed buffer.
        samples: of its batch.
    """

    num_devices: int
    ids: int
    size: int
    row_bytes: int
    entries: int
    samples: int

    @property
    def exchanged_bytes(self) -> int:
        """What all-to-all operations give a device: ids twice, rows, and their gradients."""
        return self.num_devices * self.size * (4 + 4 + self.row_bytes + self.row_bytes)

    @property
    def agreed_bytes(self) -> int:
        """What all-reduce operations give a device: where a round ends, of each owner, in lookup and update."""
        return 2 * 4 * self.num_devices

    @property
    def memory_bytes(self) -> int:
        """Buffers at most: rows before and after they are sent, the gradients of named rows, activations and their gradient."""
        return self.row_bytes * (3 * self.num_devices * self.size + self.entries + 3 * self.samples) + 16 * self.entries

    @property
    def seconds(self) -> float:
        """By the assumed speeds: links, rows of table and slot read and written at their owners, six collectives."""
        links = self.exchanged_bytes * (self.num_devices - 1) / self.num_devices / LINK_BYTES_PER_S
        rows = self.ids * self.row_bytes * 5 / ROW_BYTES_PER_S
        return links + rows + 6 * LATENCY_S


def model(setting: Setting, num_devices: int, packed: PreprocessedInput, ids: np.ndarray) -> Model:
    """The model of a packed batch; `ids` are those of the first device."""
    (stack,) = packed.layout.stacks
    size = rows_per_round(stack, num_devices, setting.sparsecores)
    return Model(num_devices, len(np.unique(ids)), size, 4 * setting.dim, stack.capacity, setting.batch)


def compile_step(setting: Setting, num_devices: int) -> tuple[Model, jax.stages.Compiled]:
    """A step for some devices."""
    specs, packed = setting.packed(num_devices, num_devices)
    mesh = jax.make_mesh((num_devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,))
    over = PartitionSpec("devices")

    def step(variables, packed):
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = jax.tree.map(lambda a: 2.0 * a, activations)
        new = embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)
        return new, jax.tree.map(jnp.sum, activations)

    def shaped(shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, over))

    variables = {}
    for stack in make_plan(specs).stacks:
        table, *slots = (shaped(shape, jnp.float32) for shape in stack.state_shapes)
        variables[stack.name] = embax.EmbeddingVariables(table, stack.optimizer.make_slots(slots))
    arrays = jax.tree.map(lambda array: shaped(array.shape, array.dtype), packed)
    mapped = jax.shard_map(
        lambda variables, packed: jax.tree.map(jnp.atleast_1d, step(variables, packed)),
        mesh=mesh,
        in_specs=(over, over),
        out_specs=over,
    )
    compiled = jax.jit(mapped, donate_argnums=0).lower(variables, arrays).compile()
    return model(setting, num_devices, packed, setting.ids(num_devices, num_devices)[: setting.batch]), compiled


_COLLECTIVE = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) (all-to-all|all-reduce)(?:-start)?\(", re.MULTILINE)
_SHAPE = re.compile(r"(f32|s32)\[([\d,]*)\]")


def collective_bytes(text: str) -> dict[str, int]:
    """Bytes that the collective operations of a compiled program give one device, each operation once."""
    found = {"all-to-all": 0, "all-reduce": 0}
    for result, operation in _COLLECTIVE.findall(text):
        for _, shape in _SHAPE.findall(result):
            found[operation] += 4 * math.prod(int(size) for size in shape.split(",") if size)
    return found


def main() -> None:
    """Checks the model, prints it, and writes it down."""
    jax.config.update("jax_num_cpu_devices", max(COMPILED))
    lines = [
        "One device's part of a step (Adagrad, float32) whose table and batch grow with the number of devices: "
        f"{SETTINGS[0].rows:,} rows x {SETTINGS[0].dim} and {SETTINGS[0].batch:,} samples x {SETTINGS[0].valency} ids a device. "
        "`exchanged` is what all-to-all operations give a device, `memory` the most that temporary buffers hold, by the model; "
        "`compiled` the same of the program that XLA compiled for CPU devices, and `—` where none was compiled. Times are "
        f"computed, not measured: links of {LINK_BYTES_PER_S / 1e9:.0f} GB/s a device and direction, rows in memory at "
        f"{ROW_BYTES_PER_S / 1e9:.0f} GB/s, {LATENCY_S * 1e6:.0f} us a collective.",
        "",
        "| ids | devices | distinct rows | sent to each | exchanged MB | compiled MB | memory MB | compiled MB | ms |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for setting in SETTINGS:
        for num_devices in (*COMPILED, *CARRIED):
            exchanged = memory = "—"
            if num_devices in COMPILED:
                one, compiled = compile_step(setting, num_devices)
                exchanged = f"{collective_bytes(str(compiled.as_text()))['all-to-all'] / 1e6:.1f}"
                analysis: Any = compiled.memory_analysis()
                memory = f"{analysis.temp_size_in_bytes / 1e6:.1f}"
            else:
                _, packed = setting.packed(num_devices, 1)
                one = model(setting, num_devices, packed, setting.ids(num_devices, 1))
            counts = f"{num_devices:,} | {one.ids:,} | {one.size:,}"
            megabytes = f"{one.exchanged_bytes / 1e6:.1f} | {exchanged} | {one.memory_bytes / 1e6:.1f} | {memory}"
            lines.append(f"| {setting.name} | {counts} | {megabytes} | {1e3 * one.seconds:.1f} |")
            print(lines[-1], flush=True)
    write_section("Scale: `python -m benchmarks.scale`", "\n".join(lines))


if __name__ == "__main__":
    main()
