"""Packing ahead in a thread: the order, the bound, errors in their places, and every way to end."""

import functools
import gc
import itertools
import subprocess
import sys
import textwrap
import threading
import time
import traceback
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from flax import nnx

import embax
from embax.linen import embed as linen_embed
from embax.nnx import embed as nnx_embed


def producers():
    return [thread for thread in threading.enumerate() if thread.name == "embax.prefetch"]


def eventually(condition):
    """Whether it becomes true; no test waits for long unless it fails."""
    deadline = time.monotonic() + 20
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.001)
    return condition()


@pytest.fixture(autouse=True)
def no_thread_is_left():
    assert eventually(lambda: not producers())  # Of tests before this one.
    yield
    assert eventually(lambda: not producers())


def settled(counted, seconds=0.05):
    """The length of a list that nothing has been added to for a while."""
    length = -1
    while length != len(counted):
        length = len(counted)
        time.sleep(seconds)
    return length


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_order_is_kept(size):
    rng = np.random.default_rng(0)
    waits = rng.random(100) * 2e-4

    def pack(number):
        time.sleep(waits[number])
        return number * number

    got = []
    for result in embax.prefetch(range(100), pack, size=size):
        got.append(result)
        time.sleep(waits[-len(got)])
    assert got == [number * number for number in range(100)]


def test_the_thread_alone_iterates_and_packs():
    threads = set()

    class Batches:
        def __iter__(self):
            threads.add(threading.current_thread())
            return self

        def __next__(self):
            threads.add(threading.current_thread())
            return 1

    def pack(_):
        threads.add(threading.current_thread())

    with embax.prefetch(Batches(), pack) as ahead:
        list(itertools.islice(ahead, 5))
        assert threads == set(producers())
    assert len(threads) == 1


@pytest.mark.parametrize("size", [1, 2, 5])
def test_never_more_than_size_ahead(size):
    drawn, packed = [], []

    def batches():
        for number in itertools.count():
            drawn.append(number)
            yield number

    with embax.prefetch(batches(), packed.append, size=size) as ahead:
        for taken in range(4):
            assert settled(packed) == size + taken  # No less either: it does work ahead.
            assert len(drawn) == size + taken
            next(ahead)


def test_only_results_that_wait_are_kept():
    """Neither the thread nor the iterator holds a result or a batch that has been handed out."""
    alive, go_on = weakref.WeakSet(), threading.Event()

    class Thing:
        def __init__(self):
            alive.add(self)

    def batches():
        yield from (Thing() for _ in range(5))
        assert go_on.wait(20)

    with embax.prefetch(batches(), lambda batch: (batch, Thing()), size=3) as ahead:
        for taken in range(1, 6):
            next(ahead)
            waiting = min(3, 5 - taken)
            assert eventually(lambda: len(alive) == 2 * waiting)  # noqa: B023 - called at once
        go_on.set()


def fail(number):
    if number == 3:
        raise KeyError("a bad batch")
    return number


def failing():
    yield from range(3)
    raise KeyError("a bad batch")


@pytest.mark.parametrize(
    ("batches", "pack", "where"), [(range(9), fail, "fail"), (failing(), int, "failing")], ids=["pack", "batches"]
)
def test_errors_come_in_their_place(batches, pack, where):
    ahead = embax.prefetch(batches, pack, size=9)
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="a bad batch") as caught:
        next(ahead)
    names = [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert names[-1] == where
    assert "test_errors_come_in_their_place" in names
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(ahead)


def test_an_error_of_iter_is_the_first_result():
    class Broken:
        def __iter__(self):
            raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        next(embax.prefetch(Broken(), int))


def test_exit_and_interrupts_of_the_function_are_raised_too():
    for kind in (SystemExit, KeyboardInterrupt, GeneratorExit):

        def pack(_, kind=kind):
            raise kind

        with pytest.raises(kind):
            next(embax.prefetch([1], pack))


def test_stop_iteration_does_not_end_the_loop_in_silence():
    with pytest.raises(RuntimeError, match="pack raised StopIteration"):
        list(embax.prefetch([[1], []], lambda batch: next(iter(batch))))


def test_the_end_is_the_end():
    ahead = embax.prefetch("ab", str.upper)
    assert list(ahead) == ["A", "B"]
    assert list(ahead) == []
    ahead.close()
    assert list(ahead) == []
    assert list(embax.prefetch([], int)) == []


def test_an_end_that_was_lost_in_an_interrupt_is_the_end_still():
    ahead = embax.prefetch([], int)
    assert ahead._producer.results.get() is not None
    assert list(ahead) == []


def test_sequences_of_the_old_protocol_are_iterated():
    class Old:
        def __getitem__(self, number):
            return [10, 20][number]

    assert list(embax.prefetch(Old(), str)) == ["10", "20"]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, int), {}, "prefetch: batches is a int, which cannot be iterated over; pass a list"),
        (([], "int"), {}, "prefetch: pack is a str, which cannot be called; pass a function"),
        (([], int), {"size": 0}, "prefetch: size is 0; it must be an integer from 1 to"),
        (([], int), {"size": 2.5}, "prefetch: size is 2.5; it must be an integer from 1 to"),
        (([], int), {"size": True}, "prefetch: size is True; it must be an integer from 1 to"),
    ],
)
def test_arguments_are_checked_at_once(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        embax.prefetch(*arguments, **options)


# Every way to end.


def test_close_wakes_a_thread_that_waits_for_room():
    packed = []
    ahead = embax.prefetch(itertools.count(), packed.append)
    assert settled(packed) == 2
    ahead.close()
    assert not producers()
    assert len(packed) == 2
    ahead.close()
    with pytest.raises(StopIteration):
        next(ahead)


def test_close_waits_for_the_batch_at_work():
    begun, go_on, done = threading.Event(), threading.Event(), []

    def pack(number):
        begun.set()
        assert go_on.wait(20)
        done.append(number)

    ahead = embax.prefetch(itertools.count(), pack)
    assert begun.wait(20)
    threading.Timer(0.05, go_on.set).start()
    ahead.close()
    assert done == [0]
    assert not producers()


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_close_after_an_error_that_nobody_asked_for(taken):
    ahead = embax.prefetch(range(9), fail, size=9)
    list(itertools.islice(ahead, taken))
    assert eventually(lambda: not producers())
    ahead.close()
    assert list(ahead) == []


def test_close_ends_a_next_in_another_thread():
    begun, go_on, ended = threading.Event(), threading.Event(), []

    def pack(_):
        begun.set()
        assert go_on.wait(20)

    ahead = embax.prefetch([1, 2], pack)
    consumers = [threading.Thread(target=lambda: ended.append(list(ahead))) for _ in range(3)]
    for consumer in consumers:
        consumer.start()
    assert begun.wait(20)
    closing = threading.Thread(target=ahead.close)
    closing.start()
    assert eventually(lambda: len(ended) == 3)  # While the thread is still at its batch.
    assert producers()
    go_on.set()
    for thread in (closing, *consumers):
        thread.join()
    assert ended == [[], [], []]


def test_several_threads_share_the_results():
    ahead, got = embax.prefetch(range(1000), int), []
    consumers = [threading.Thread(target=lambda: got.extend(ahead)) for _ in range(4)]
    for consumer in consumers:
        consumer.start()
    for consumer in consumers:
        consumer.join()
    assert sorted(got) == list(range(1000))


def test_close_from_the_function_ends_the_thread():
    box = []

    def pack(number):
        assert eventually(lambda: box)
        box[0].close()
        return number

    box.append(embax.prefetch(range(5), pack))
    assert list(box[0]) == []


def test_leaving_a_with_block_closes():
    with embax.prefetch(itertools.count(), int) as ahead:
        for number in ahead:
            if number == 4:
                break
    assert not producers()

    with pytest.raises(ZeroDivisionError), embax.prefetch(itertools.count(), int) as ahead:
        print(1 // next(ahead))
    assert not producers()


def test_leaving_a_loop_leaves_no_thread():
    for number in embax.prefetch(itertools.count(), int):
        if number == 4:
            break
    assert eventually(lambda: not producers())


def test_an_iterator_in_a_cycle_leaves_no_thread():
    ahead = embax.prefetch(itertools.count(), int)
    ahead.itself = ahead
    next(ahead)
    del ahead
    gc.collect()
    assert eventually(lambda: not producers())


@pytest.mark.parametrize("how", ["close", "drop", "error"])
def test_a_generator_is_closed_in_the_thread(how):
    closed = []

    def batches():
        try:
            yield from itertools.count()
        finally:
            closed.append(threading.current_thread().name)

    ahead = embax.prefetch(batches(), fail if how == "error" else int, size=9)
    next(ahead)
    if how == "close":
        ahead.close()
    elif how == "drop":
        del ahead
    assert eventually(lambda: closed) == ["embax.prefetch"]


def test_files_stay_open(tmp_path):
    path = tmp_path / "lines"
    path.write_text("1\n2\n3\n4\n")
    with path.open() as lines:
        with embax.prefetch(lines, int) as ahead:
            assert next(ahead) == 1
        assert not lines.closed


def stubborn():
    try:
        yield from itertools.count()
    finally:
        raise OSError("cannot close")


def test_what_a_generator_raises_as_it_is_closed_comes_from_close():
    ahead = embax.prefetch(stubborn(), int)
    next(ahead)
    with pytest.raises(OSError, match="cannot close"):
        ahead.close()
    ahead.close()


def test_what_a_dropped_generator_raises_is_not_lost(monkeypatch):
    hooked = []
    monkeypatch.setattr(threading, "excepthook", lambda args: hooked.append(args.exc_value))
    next(embax.prefetch(stubborn(), int))
    assert eventually(lambda: hooked)
    assert str(hooked[0]) == "cannot close"


def test_an_interrupted_consumer_can_go_on():
    """In a process of its own, whose main thread gets signals while it waits for results, at any place of that."""
    got = run(
        """
        import itertools, os, signal, threading, time, embax
        signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        ahead = embax.prefetch(range(2000), lambda number: (time.sleep(3e-5), number)[1], size=1)
        got, interrupts = [], 0
        while True:
            signal.setitimer(signal.ITIMER_REAL, 2e-4 + 1e-6 * (interrupts % 100))
            try:
                for number in ahead:
                    got.append(number)
                signal.setitimer(signal.ITIMER_REAL, 0)
                break
            except KeyboardInterrupt:
                interrupts += 1
        ahead.close()
        # An interrupt may take the result with it that a call was about to return, as with every iterator.
        print(got == sorted(set(got)), len(got) + interrupts >= 2000, interrupts > 10, list(ahead), threading.active_count())
        """
    )
    assert got == "True True True [] 1\n"


# The end of the interpreter.


def run(code, timeout=60):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.parametrize("alive", [True, False], ids=["held", "dropped"])
@pytest.mark.parametrize(
    "pack",
    [
        "lambda number: number",
        "lambda number: embax.preprocess({'f': np.arange(200_000).reshape(-1, 20) % 50}, specs=specs, limits='grow')",
        "lambda number: jnp.dot(*[jax.device_put(np.ones((200, 200), np.float32))] * 2)",
    ],
    ids=["waiting", "packing", "jax"],
)
def test_the_interpreter_ends(pack, alive):
    run(
        f"""
        import itertools, jax, numpy as np, jax.numpy as jnp, embax
        table = embax.TableSpec(name="t", vocabulary_size=50, embedding_dim=8, initializer=jax.nn.initializers.zeros,
            optimizer=embax.SGDOptimizerSpec(0.1), combiner="sum", max_ids_per_partition=100_000,
            max_unique_ids_per_partition=100_000)
        specs = {{"f": embax.FeatureSpec(name="f", table_spec=table, input_shape=(10_000, 20), output_shape=(10_000, 8))}}
        embax.prepare_feature_specs_for_training(specs, 1, 4)
        import logging; logging.disable()
        ahead = embax.prefetch(itertools.count(), {pack}, size=100)
        next(ahead)
        if not {alive}:
            del ahead
        """
    )


def test_the_interpreter_does_not_wait_forever():
    started = time.monotonic()
    run(
        """
        import time, embax, embax._prefetch
        embax._prefetch._EXIT_SECONDS = 0.1
        ahead = embax.prefetch([1], lambda _: time.sleep(1000))
        """
    )
    assert time.monotonic() - started < 60


# Training.

STEPS, BATCH = 60, 64


def specs_of(dim=64):
    table = oracle.table_spec(vocabulary=3000, dim=dim, optimizer=embax.AdagradOptimizerSpec(0.1))
    return {"f": oracle.feature_spec("f", table, batch=BATCH)}


def batches_that_grow(steps=STEPS):
    rng = np.random.default_rng(0)
    for step in range(steps):
        ids = rng.integers(0, 3000, (BATCH, 2 + step // 4))
        yield {"f": ids}, (ids[:, 0] % 2).astype(np.float32)


def test_training_is_that_of_a_loop_with_limits_that_grow():
    """The steps are dispatched without waiting for any: memory that is used again too early would change the bits."""
    specs = specs_of()
    embax.prepare_feature_specs_for_training(specs)

    @functools.partial(jax.jit, donate_argnames="variables")
    def train_step(variables, packed, labels):
        activations = embax.lookup(packed, variables, specs=specs)
        gradients = jax.grad(lambda a: (jnp.tanh(a["f"] @ jnp.ones((64, 64))).mean(axis=1) - labels).sum())(activations)
        return embax.apply_gradients(gradients, packed, variables, specs=specs, activations=activations)

    def trained(packed_batches, wait):
        variables = embax.init_embedding_variables(jax.random.key(0), specs)
        layouts = []
        for packed, labels in packed_batches:
            layouts.append(packed.layout)
            variables = train_step(variables, packed, labels)
            if wait:
                jax.block_until_ready(variables)
            del packed
        return jax.tree.map(np.asarray, variables), layouts

    def packer():
        pack = embax._preprocess.packer.Packer(specs, limits="grow")
        return lambda batch: (pack(batch[0]), batch[1])

    wanted, layouts = trained(map(packer(), batches_that_grow()), wait=True)
    assert len(set(layouts)) > 3
    for size in (1, 2, 30):
        got, same_layouts = trained(embax.prefetch(batches_that_grow(), packer(), size=size), wait=False)
        assert same_layouts == layouts
        jax.tree.map(np.testing.assert_array_equal, got, wanted)


def test_a_batch_packed_before_limits_grew_stays_valid():
    specs = specs_of(8)
    embax.prepare_feature_specs_for_training(specs)
    variables = embax.init_embedding_variables(jax.random.key(0), specs)
    table = oracle.tables_of(variables, specs)["table"][0]
    batches = [{"f": np.arange(BATCH * width).reshape(BATCH, width) % 3000} for width in (1, 5, 25)]
    pack = functools.partial(embax.preprocess, specs=specs, limits="grow")
    with embax.prefetch(batches, pack, size=4) as ahead:
        assert eventually(lambda: not producers())  # All are packed before the first is used.
        packed_batches = list(ahead)
    assert len({packed.layout for packed in packed_batches}) == 3
    for packed, ids in zip(packed_batches, batches, strict=True):
        activations = embax.lookup(packed, variables, specs=specs)["f"]
        np.testing.assert_allclose(activations, oracle.lookup(table, ids["f"], "sum"), rtol=1e-4, atol=1e-4)


class NnxModel(nnx.Module):
    def __init__(self):
        self.embed = nnx_embed.SparseCoreEmbed(specs_of(8), rngs=nnx.Rngs(0))
        self.head = nnx.Linear(8, 1, rngs=nnx.Rngs(1))

    def __call__(self, packed):
        return self.head(self.embed(packed)["f"])[:, 0]


@nnx.jit
def nnx_step(model, optimizer, packed, labels):
    loss, gradients = nnx.value_and_grad(lambda model: ((model(packed) - labels) ** 2).mean())(model)
    optimizer.update(model, gradients)
    return loss


def test_nnx_layer():
    states = []
    for ahead in (False, True):
        model = NnxModel()
        optimizer = nnx_embed.PartitionedOptimizer(model, optax.sgd(0.1))
        packer = model.embed.packer
        packed_batches = (embax.prefetch if ahead else lambda batches, pack: map(pack, batches))(
            batches_that_grow(40), lambda batch, packer=packer: (packer(batch[0]), batch[1])
        )
        for packed, labels in packed_batches:
            nnx_step(model, optimizer, model.embed.preprocess(packed), labels)
        states.append(jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model))))
    jax.tree.map(np.testing.assert_array_equal, *states)


class LinenModel(nn.Module):
    embed: linen_embed.SparseCoreEmbed

    @nn.compact
    def __call__(self, packed):
        return nn.Dense(1)(self.embed(packed)["f"])[:, 0]


@pytest.mark.parametrize("devices", [1, 4])
def test_linen_layer(devices):
    """Also on several devices, where the thread puts the batches on them."""
    mesh = None if devices == 1 else jax.sharding.Mesh(jax.devices()[:devices], "devices")
    embed = linen_embed.SparseCoreEmbed(specs_of(8), mesh=mesh)
    model = LinenModel(embed)
    initial = model.init(jax.random.key(0), embed.preprocess(next(batches_that_grow())[0]))["params"]
    tx = linen_embed.create_optimizer_for_sc_model(initial, optax.sgd(0.1))

    @jax.jit
    def train_step(params, state, packed, labels):
        loss_of = lambda params: ((model.apply({"params": params}, packed) - labels) ** 2).mean()  # noqa: E731
        loss, gradients = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(gradients, state, params)
        return linen_embed.apply_updates_for_sc_model(params, updates), state, loss

    trained = []
    for pack_all in (map, lambda pack, batches: embax.prefetch(batches, pack)):
        params, state, in_flight = initial, tx.init(initial), embax.StepsInFlight()
        for packed, labels in pack_all(
            lambda batch: (embed.preprocess(batch[0]), batch[1]), batches_that_grow(20 // devices)
        ):
            params, state, loss = train_step(params, state, packed, labels)
            in_flight(loss)
        trained.append(jax.tree.map(np.asarray, params))
    jax.tree.map(np.testing.assert_array_equal, *trained)
