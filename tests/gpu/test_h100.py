"""Training steps, compiled for an NVIDIA H100, update their tables in place at a cost that follows the batch."""

import re

import jax
import jax.numpy as jnp
import oracle
import pytest
from optimized_hlo import instructions, violations
from test_optimizers import OPTIMIZERS

import embax
from benchmarks.prove_in_place import BATCH, DIM, FORMS, LOSSES, PLAIN_FORMS, VOCABULARIES, Setting, abstract, memory_of

# Bytes, a bit for each row by which the vocabularies differ: for GPUs XLA orders a step by what it costs, and so packs its memory
# a little better or worse.
SLACK = (VOCABULARIES[1] - VOCABULARIES[0]) // 8


def every_optimizer(vocabulary):
    """One table an optimizer, and among them each combiner, quantized and not."""
    tables = [
        oracle.table_spec(
            f"table{k}",
            vocabulary,
            DIM,
            ("sum", "mean", "sqrtn")[k % 3],
            optimizer,
            quantization_config=embax.QuantizationConfig(-1.0, 1.0, 256) if k % 2 else None,
        )
        for k, (optimizer, _) in enumerate(OPTIMIZERS.values())
    ]
    return embax.prepare_feature_specs_for_training(
        {table.name: oracle.feature_spec(table.name, table, BATCH, 1) for table in tables}
    )


def assert_in_place(compile_step, loss, setting):
    compiled = [compile_step(vocabulary, loss, setting) for vocabulary in VOCABULARIES]
    memory = memory_of(compiled, setting)
    assert memory.in_place(SLACK), memory
    for vocabulary, step in zip(VOCABULARIES, compiled, strict=True):
        assert not violations(step.as_text(), vocabulary)  # The elements of a slot of one value a row.
        # And the check did see the updates: one scatter into each table and slot.
        writes = [one for one in instructions(step.as_text()) if one.opcode == "scatter" and one.elements >= vocabulary]
        assert len(writes) == len(setting.arrays(vocabulary))


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("form", PLAIN_FORMS)
def test_every_form_of_a_step_is_in_place(h100, form, loss, standard_promotion):
    assert_in_place(FORMS[form], loss, Setting(device=h100))


@pytest.mark.parametrize(("loss", "minibatching"), [(LOSSES[0], True), (LOSSES[1], False)])
def test_every_optimizer_is_in_place(h100, loss, minibatching):
    assert_in_place(FORMS["explicit"], loss, Setting(every_optimizer, minibatching, h100))


def test_every_optimizer_is_in_place_in_a_layer(h100, standard_promotion):
    assert_in_place(FORMS["nnx"], LOSSES[0], Setting(every_optimizer, device=h100))


def test_a_step_holds_no_loop(h100):
    """Each turn of a loop would start its kernels anew."""
    step = FORMS["explicit"](VOCABULARIES[0], LOSSES[0], Setting(device=h100))
    assert not [one for one in instructions(step.as_text()) if one.opcode == "while"]


# What the check must see: steps that do it wrong, by the instruction that gives each away.
def plain_step(update, h100, donate=True):
    """The optimized HLO of a step on a table and a slot whose update is `update(table, slot, ids, gradients)`."""
    shapes = [jnp.zeros((1, DIM)), jnp.zeros(BATCH, jnp.int32), jnp.zeros((BATCH, DIM))]
    table, ids, gradients = abstract(shapes, h100)
    table = jax.ShapeDtypeStruct((VOCABULARIES[0], DIM), table.dtype, sharding=table.sharding)
    step = jax.jit(update, donate_argnums=(0, 1) if donate else ())
    return step.lower(table, table, ids, gradients).compile().as_text()


def unique_writes(table, slot, ids, gradients):
    """As embax updates, of ids that are unique and sorted."""
    options = {"unique_indices": True, "indices_are_sorted": True, "mode": "drop"}
    slot_rows = slot[ids] + gradients**2
    table = table.at[ids].set(table[ids] - gradients / jnp.sqrt(slot_rows), **options)
    return table, slot.at[ids].set(slot_rows, **options)


def adding_writes(table, slot, ids, gradients):
    return table.at[ids].add(gradients), slot.at[ids].add(gradients**2)


def segment_sums(table, slot, ids, gradients):
    places = jnp.cumsum(jnp.diff(ids, prepend=ids[:1]) != 0)
    return unique_writes(table, slot, ids, jax.ops.segment_sum(gradients, places, BATCH))


def sweep(table, slot, ids, gradients):
    """The gradient of `table[ids]`, and an optimizer that visits every row."""
    gradient = jax.grad(lambda table: jnp.sum(table[ids] * gradients))(table)
    slot = slot + gradient**2
    return table - gradient / jnp.sqrt(slot + 1e-10), slot


def guarded(table, slot, ids, gradients):
    finite = jnp.isfinite(gradients).all()
    new = unique_writes(table, slot, ids, gradients)
    return jnp.where(finite, new[0], table), jnp.where(finite, new[1], slot)


def normed(table, slot, ids, gradients):
    return (*unique_writes(table, slot, ids, gradients), jnp.sum(table**2))


def transposed(table, slot, ids, gradients):
    return *unique_writes(table, slot, ids, gradients), table.T


def test_unique_writes_pass_the_check(h100):
    assert not violations(plain_step(unique_writes, h100), VOCABULARIES[0] * DIM)


@pytest.mark.parametrize(
    ("update", "donate", "sign"),
    [
        (unique_writes, False, "as large as a table: copy"),
        (adding_writes, True, "duplicates: scatter"),
        (segment_sums, True, "duplicates: scatter"),
        (sweep, True, "as large as a table: (add|subtract)"),
        (guarded, True, "as large as a table: select"),
        (normed, True, "reads a table: (multiply|reduce)"),
        (transposed, True, "as large as a table: transpose"),
    ],
)
def test_a_step_that_does_it_wrong_is_seen(h100, update, donate, sign):
    found = violations(plain_step(update, h100, donate), VOCABULARIES[0] * DIM)
    assert any(re.match(sign, violation) for violation in found), found
