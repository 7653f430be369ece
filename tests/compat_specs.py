"""Small specs of `embax.compat`, and the same of embax, for its tests."""

import jax

import embax
from embax.compat.sparsecore.lib.nn import embedding, embedding_spec

NORMAL = jax.nn.initializers.normal(1.0)


def table(name="table", vocabulary=50, dim=8, combiner="sum", optimizer=None, **fields):
    return embedding_spec.TableSpec(
        name=name,
        vocabulary_size=vocabulary,
        embedding_dim=dim,
        initializer=fields.pop("initializer", NORMAL),
        optimizer=optimizer or embedding_spec.SGDOptimizerSpec(0.1),
        combiner=combiner,
        **fields,
    )


def feature(name, of_table, batch=16, valency=3):
    return embedding_spec.FeatureSpec(
        name=name, table_spec=of_table, input_shape=[batch, valency], output_shape=[batch, of_table.embedding_dim]
    )


def placed(features, devices=1, sparsecores=4):
    embedding.prepare_feature_specs_for_training(features, devices, sparsecores)
    return features


def of_embax(features, devices=1, sparsecores=4):
    """The same features as specs of embax, stacked and placed alike."""
    tables = {}
    for one in features.values():
        spec = one.table_spec
        tables[spec.name] = embax.TableSpec(
            name=spec.name,
            vocabulary_size=spec.vocabulary_size,
            embedding_dim=spec.embedding_dim,
            initializer=NORMAL,
            optimizer=spec.optimizer.as_embax(),
            combiner=spec.combiner,
            max_ids_per_partition=spec.max_ids_per_partition,
            max_unique_ids_per_partition=spec.max_unique_ids_per_partition,
        )
    specs = {
        name: embax.FeatureSpec(
            name=one.name,
            table_spec=tables[one.table_spec.name],
            input_shape=one.input_shape,
            output_shape=one.output_shape,
        )
        for name, one in features.items()
    }
    embax.auto_stack_tables(specs, devices, sparsecores)
    return embax.prepare_feature_specs_for_training(specs, devices, sparsecores)
