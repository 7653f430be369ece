"""Steps update tables and slots in place: what XLA reports of their memory does not depend on the vocabulary."""

import pytest

from benchmarks import prove_in_place


@pytest.mark.parametrize(
    ("backend", "forms"),
    [("native", tuple(prove_in_place.FORMS)), ("portable", prove_in_place.PLAIN_FORMS)],
    ids=["native", "portable"],
)
def test_every_form_of_a_step_is_in_place(backend, forms, standard_promotion):
    memories = list(prove_in_place.measure(backend, forms))
    assert len(memories) == len(forms) * len(prove_in_place.LOSSES)
    for form, loss, memory in memories:
        assert memory.in_place(), (form, loss, memory)


def test_a_step_that_copies_is_seen():
    copying = prove_in_place.Memory([100, 400], [100, 400], [100, 400])
    assert not copying.in_place()
    assert not copying.in_place(slack=299)
    assert not copying._replace(temporary=[100, 100], aliased=[0, 0]).in_place()
    assert copying._replace(temporary=[100, 100]).in_place()
    assert copying._replace(temporary=[110, 100]).in_place(slack=10)
