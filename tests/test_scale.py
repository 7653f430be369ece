"""The model of a step on many devices against what XLA compiles, and what it says of more devices than there are."""

import pytest

from benchmarks import scale

SETTING = scale.Setting("small", dim=16, batch=512, valency=4, rows=10_000, sparsecores=2, exponent=1.05)


@pytest.mark.parametrize("num_devices", scale.COMPILED)
def test_the_model_is_what_programs_exchange(num_devices):
    model, compiled = scale.compile_step(SETTING, num_devices)
    found = scale.collective_bytes(compiled.as_text())
    assert found["all-to-all"] == model.exchanged_bytes
    assert found["all-reduce"] == model.agreed_bytes
    temporary = compiled.memory_analysis().temp_size_in_bytes
    assert 0.5 * model.memory_bytes < temporary < 1.05 * model.memory_bytes


def test_neither_depends_on_the_vocabulary():
    larger = scale.dataclasses.replace(SETTING, rows=1_000_000, exponent=None)
    model, compiled = scale.compile_step(larger, 4)
    assert scale.collective_bytes(compiled.as_text())["all-to-all"] == model.exchanged_bytes
    assert compiled.memory_analysis().temp_size_in_bytes < 1.05 * model.memory_bytes < 1e6 * 2


def test_more_devices_cost_a_device_little_more():
    """A device of 1,024 names about as many rows as one of 8, and sends less than twice their number."""
    _, few = SETTING.packed(8, 1)
    _, many = SETTING.packed(256, 1)
    of_few = scale.model(SETTING, 8, few, SETTING.ids(8, 1))
    of_many = scale.model(SETTING, 256, many, SETTING.ids(256, 1))
    assert of_few.ids < of_many.ids < 1.5 * of_few.ids
    assert of_many.exchanged_bytes < 8 * of_few.exchanged_bytes
