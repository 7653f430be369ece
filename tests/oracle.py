"""Lookup and update in float64 NumPy, straight from their definition: what every lowering is tested against."""

import jax
import numpy as np
from flax import nnx

import embax
from embax._stacking.layout import take_table
from embax._stacking.plan import make_plan

# One object for all tables: a compiled initialization is kept by the identity of its initializer.
NORMAL = jax.nn.initializers.normal(1.0)


def gains_of(ids, combiner, weights=None):
    """For each sample, the (id, gain) pairs of its ids; `ids` and `weights` are lists of rows, -1 is padding."""
    rows = []
    for number, row in enumerate(ids):
        weighted = [
            (int(i), 1.0 if weights is None else float(weights[number][k])) for k, i in enumerate(row) if i >= 0
        ]
        total = sum(w for _, w in weighted)
        square = sum(w * w for _, w in weighted) ** 0.5
        divisor = {"sum": 1.0, "mean": total, "sqrtn": square}[combiner]
        rows.append([(i, w / divisor if divisor else 0.0) for i, w in weighted])
    return rows


def lookup(table, ids, combiner, weights=None):
    """float64[batch, dim]: the activations of one feature."""
    out = np.zeros((len(ids), table.shape[1]))
    for sample, row in enumerate(gains_of(ids, combiner, weights)):
        for i, gain in row:
            out[sample] += gain * table[i]
    return out


def row_gradients(num_rows, features, combiner):
    """float64[num_rows, dim] and bool[num_rows]: gradients of a table's rows, and which rows are touched.

    `features` holds (ids, weights, gradient of the activations) of each feature of the table.
    """
    gradient = np.zeros((num_rows, np.asarray(features[0][2]).shape[1]))
    touched = np.zeros(num_rows, bool)
    for ids, weights, upstream in features:
        for sample, row in enumerate(gains_of(ids, combiner, weights)):
            for i, gain in row:
                gradient[i] += gain * np.asarray(upstream, np.float64)[sample]
                touched[i] = True
    return gradient, touched


def variables_of(layer):
    """`EmbeddingVariables` of an NNX layer by stack, as NumPy arrays."""
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)  # noqa: E731
    return jax.tree.map(lambda one: np.asarray(one[...]), layer.tables, is_leaf=is_variable)


def tables_of(variables, specs):
    """For each table its logical arrays [table, *slots], as NumPy."""
    plan = make_plan(specs)
    return {
        table.name: [
            np.asarray(take_table(array, table, plan.num_sparsecores))
            for array in (variables[stack.name].table, *variables[stack.name].slot)
        ]
        for stack in plan.stacks
        for table in stack.tables
    }


def table_spec(name="table", vocabulary=50, dim=8, combiner="sum", optimizer=None, initializer=None, **fields):
    """A table with sensible defaults."""
    return embax.TableSpec(
        name=name,
        vocabulary_size=vocabulary,
        embedding_dim=dim,
        initializer=initializer or NORMAL,
        optimizer=optimizer or embax.SGDOptimizerSpec(0.1),
        combiner=combiner,
        **fields,
    )


def feature_spec(name, table, batch=10, valency=3, **fields):
    """A feature of `table`."""
    shapes = {"input_shape": (batch, valency), "output_shape": (batch, table.embedding_dim)}
    return embax.FeatureSpec(name=name, table_spec=table, **(shapes | fields))
