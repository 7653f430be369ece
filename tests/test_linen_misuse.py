"""What JAX recipes that touch gradients do to a Linen model: each trains it right, or is found out and leaves the tables."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from flax.serialization import from_bytes, to_bytes
from flax.training.train_state import TrainState

import embax
from embax.linen.embed import (
    EMBEDDING_PARAM_NAME,
    SparseCoreEmbed,
    apply_updates_for_sc_model,
    create_optimizer_for_sc_model,
)

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, DIM, VOCABULARY, RATE = 8, 8, 64, 0.5
SLOW = pytest.mark.filterwarnings("ignore::embax.SlowPathWarning")


def mesh_of(size):
    return jax.sharding.Mesh(np.array(jax.devices()[:size]), ("x",))


class Setting:
    """A layer, a dense bias, their parameters, and a jitted step that is right."""

    def __init__(self, devices=1, optimizer=None, stacks=("t",), **options):
        optimizer = optimizer or embax.AdagradOptimizerSpec(RATE)
        tables = {name: oracle.table_spec(name, VOCABULARY, DIM, "sum", optimizer) for name in stacks}
        specs = {name: oracle.feature_spec(name, table, BATCH) for name, table in tables.items()}
        mesh = {} if devices == 1 else {"mesh": mesh_of(devices)}
        self.layer = SparseCoreEmbed(specs, **mesh, **options)
        self.params = {
            "embed": self.layer.init(jax.random.key(0), self.batch(0))["params"],
            "bias": jnp.full(DIM, 0.25, jnp.float32),
        }
        if mesh:  # As a step returns them.
            self.params = jax.device_put(self.params, nn.get_sharding(self.params, mesh["mesh"]))
        self.optimizer = create_optimizer_for_sc_model(self.params, optax.sgd(RATE))
        self.state = self.optimizer.init(self.params)
        self.before = self.tables(self.params)
        self.right = jax.jit(self.step_with(lambda gradients: gradients))

    def ids(self, seed):
        rng = np.random.default_rng(seed)
        return {name: rng.integers(0, VOCABULARY, (BATCH, 3)).astype(np.int32) for name in self.layer.feature_specs}

    def batch(self, seed):
        return self.layer.preprocess(self.ids(seed))

    def box(self, params):
        return params["embed"][EMBEDDING_PARAM_NAME]

    def tables(self, params):
        return jax.tree.map(lambda leaf: np.array(leaf, copy=True), self.box(params).value)

    def loss(self, params, packed):
        activations = self.layer.apply({"params": params["embed"]}, packed)
        return sum(jnp.mean((leaf.astype(jnp.float32) + params["bias"] - 1) ** 2) for leaf in activations.values())

    def gradients(self, params, packed):
        return jax.grad(self.loss)(params, packed)

    def step_with(self, change, gradients=None):
        """A step whose gradients are changed."""

        def step(params, *batches):
            updates, _ = self.optimizer.update(
                change((gradients or self.gradients)(params, *batches)), self.state, params
            )
            return apply_updates_for_sc_model(params, updates)

        return step

    def unchanged(self, params):
        jax.tree.map(np.testing.assert_array_equal, self.before, self.tables(params))

    def check_found_in_jit(self, after, message, kept=True):
        """The parameters after a jitted step that went wrong: tables kept, NaN inside jit, and an error outside it."""
        if kept:
            self.unchanged(after)
        look_up = jax.jit(lambda params, packed: self.layer.apply({"params": params["embed"]}, packed))
        assert all(np.isnan(leaf).all() for leaf in look_up(after, self.batch(0)).values())
        # Later right steps change nothing.
        jax.tree.map(np.testing.assert_array_equal, self.tables(after), self.tables(self.right(after, self.batch(0))))
        bound = {"params": after["embed"]}
        calls = [
            lambda: self.layer.apply(bound, self.batch(0)),
            lambda: self.layer.apply(bound, "t", [1], method="rows"),
            lambda: self.layer.apply(bound, {}, self.batch(0), method="apply_gradient"),
            lambda: self.right_outside_jit(after),
        ]
        for call in calls:
            with pytest.raises(ValueError, match=message) as raised:
                call()
            assert ("left as they are" in str(raised.value)) == kept
            assert ("Restore the parameters" in str(raised.value)) == (not kept)
        if kept:  # And it can go on.
            cleared = {**after, "embed": self.layer.load(after["embed"], {}), "bias": self.params["bias"]}
            jax.tree.map(
                np.testing.assert_array_equal,
                self.tables(self.right(cleared, self.batch(3))),
                self.tables(self.right(self.params, self.batch(3))),
            )

    def right_outside_jit(self, params):
        return apply_updates_for_sc_model(params, jax.tree.map(jnp.zeros_like, params))


def microbatch_mean(setting, params, *batches):
    each = [setting.gradients(params, batch) for batch in batches]
    return jax.tree.map(lambda *leaves: sum(leaves) / len(leaves), *each)


def microbatch_mean_in_scan(setting, params, *batches):
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

    def add(total, packed):
        return jax.tree.map(jnp.add, total, setting.gradients(params, packed)), None

    total, _ = jax.lax.scan(add, jax.tree.map(jnp.zeros_like, params), stacked)
    return jax.tree.map(lambda leaf: leaf / len(batches), total)


def with_loss(extra, setting, params, packed, *_):
    return jax.grad(lambda params: setting.loss(params, packed) + extra(setting, params))(params)


def tied(setting, params):
    table = setting.box(params).value["t"].table
    return jnp.mean((jnp.ones(DIM) @ table.T.astype(jnp.float32)) ** 2)


def of_rows(rows, setting, params):
    return 0.01 * jnp.sum(setting.box(params).value["t"].table[rows] ** 2)


def of_all_parameters(setting, params):
    return 1e-4 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))


def scaled(factor, setting, params, packed, *_):
    return jax.tree.map(lambda leaf: leaf * factor, setting.gradients(params, packed))


def clipped(setting, params, packed, *_):
    clip = optax.clip_by_global_norm(1.0)
    return clip.update(setting.gradients(params, packed), clip.init(params))[0]


def decayed(setting, params, packed, *_):
    decay = optax.add_decayed_weights(1e-3)
    return decay.update(setting.gradients(params, packed), decay.init(params), params)[0]


def twice_in_nested_jit(setting, params, packed, *_):
    loss = jax.jit(setting.loss)
    return jax.grad(lambda params: loss(params, packed) * loss(params, packed))(params)


RECIPES = {
    "mean of microbatches": (microbatch_mean, "scaled or averaged"),
    "mean of microbatches in scan": (microbatch_mean_in_scan, "scaled or averaged"),
    "tied output layer": (functools.partial(with_loss, tied), "A dense gradient was added"),
    "L2 on all rows": (functools.partial(with_loss, functools.partial(of_rows, slice(None))), "A dense gradient"),
    "L2 on one row": (functools.partial(with_loss, functools.partial(of_rows, slice(0, 1))), "A dense gradient"),
    "L2 on all parameters": (
        functools.partial(with_loss, of_all_parameters),
        "A dense gradient.*penalty on all parameters",
    ),
    "scale": (functools.partial(scaled, 1 / 3), "scaled or averaged"),
    "scale by a power of 2": (
        functools.partial(scaled, 4.0),
        r"looked up 4 times.*or their gradient was multiplied by 4",
    ),
    "negative scale": (functools.partial(scaled, -1.0), "scaled or averaged"),
    "clip by global norm": (clipped, "scaled or averaged"),
    "weight decay": (decayed, "A dense gradient.*the optimizer decays all weights"),
    "two lookups": (twice_in_nested_jit, "looked up 2 times in one differentiated step"),
}


@SLOW
@pytest.mark.parametrize(
    ("recipe", "devices"),
    [*((recipe, 1) for recipe in RECIPES), ("mean of microbatches in scan", 4), ("L2 on one row", 4), ("scale", 2)],
)
def test_a_recipe_that_touches_gradients_is_found(recipe, devices):
    setting = Setting(devices)
    gradients, message = RECIPES[recipe]
    gradients = functools.partial(gradients, setting)
    batches = [setting.batch(seed) for seed in range(4)]
    step = setting.step_with(lambda gradients: gradients, gradients)
    if recipe == "mean of microbatches":  # The trace shows that these are several lookups.
        with pytest.raises(ValueError, match="Stack 't' is looked up twice in one differentiated step"):
            jax.jit(step)(setting.params, *batches)
    else:
        setting.check_found_in_jit(jax.jit(step)(setting.params, *batches), message)
    if devices > 1:
        return  # Slow outside jit.
    # Outside jit it is an error at once; also if the gradients come from a jitted function.
    with pytest.raises(ValueError, match=message):
        step(setting.params, *batches)
    if recipe != "mean of microbatches":
        with pytest.raises(ValueError, match=message):
            setting.step_with(lambda gradients: gradients, jax.jit(gradients))(setting.params, *batches)
    setting.unchanged(setting.params)


def a_chain(setting):
    return optax.chain(optax.clip_by_global_norm(1.0), setting.optimizer)


def multi_steps(setting):
    return optax.MultiSteps(setting.optimizer, 2)


@SLOW
@pytest.mark.parametrize("transformation", [a_chain, multi_steps])
def test_a_transformation_around_the_optimizer_is_found(transformation):
    setting = Setting()
    optimizer = transformation(setting)

    @jax.jit
    def step(params, state, packed):
        updates, state = optimizer.update(setting.gradients(params, packed), state, params)
        return apply_updates_for_sc_model(params, updates), state

    params, state = setting.params, optimizer.init(setting.params)
    params, state = step(params, state, setting.batch(0))
    if transformation is multi_steps:  # The first step of two has only zeros as updates.
        setting.unchanged(params)
        setting.layer.apply({"params": params["embed"]}, setting.batch(0))
        params, state = step(params, state, setting.batch(1))
    setting.check_found_in_jit(params, "scaled or averaged")


@SLOW
def test_the_mean_over_devices_is_found():
    setting = Setting()
    mesh, batches = mesh_of(2), [setting.batch(seed) for seed in range(2)]
    packed = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)

    @jax.jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(jax.P(), jax.P("x")), out_specs=jax.P(), check_vma=False)
    def step(params, packed):
        def of_device(params, packed):
            return jax.lax.pmean(setting.gradients(params, packed), "x")

        return setting.step_with(lambda gradients: gradients, of_device)(params, jax.tree.map(lambda a: a[0], packed))

    setting.check_found_in_jit(step(setting.params, packed), "scaled or averaged")


@SLOW
def test_a_scaled_loss_whose_gradients_are_divided_by_the_scale_is_found():
    setting, scale = Setting(), 1024.0

    def gradients(params, packed):
        return jax.grad(lambda params: scale * setting.loss(params, packed))(params)

    step = setting.step_with(lambda gradients: jax.tree.map(lambda leaf: leaf / scale, gradients), gradients)
    setting.check_found_in_jit(jax.jit(step)(setting.params, setting.batch(0)), "scaled or averaged.*scale of a loss")


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda setting: setting.optimizer, "added to the old ones, by optax.apply_updates or by apply_gradients of a"),
        (lambda setting: optax.adam(1e-6), "An optimizer stepped the tables.*create_optimizer_for_sc_model"),
        (lambda setting: optax.adamw(1e-3), "An optimizer stepped the tables"),
        (lambda setting: optax.sgd(1e-30), "An optimizer stepped the tables"),
    ],
    ids=["create_optimizer_for_sc_model", "adam", "adamw", "sgd"],
)
def test_a_train_state_is_found(make, message, jitted):
    setting = Setting()
    state = TrainState.create(apply_fn=None, params=setting.params, tx=make(setting))

    def step(state, packed):
        return state.apply_gradients(grads=setting.gradients(state.params, packed))

    state = (jax.jit(step) if jitted else step)(state, setting.batch(0))
    setting.check_found_in_jit(state.params, message, kept=False)


def test_a_train_state_can_be_stepped_right():
    setting = Setting()
    state = TrainState.create(apply_fn=None, params=setting.params, tx=setting.optimizer)

    @jax.jit
    def step(state, packed):
        updates, of_optimizer = state.tx.update(setting.gradients(state.params, packed), state.opt_state, state.params)
        params = apply_updates_for_sc_model(state.params, updates)
        return state.replace(step=state.step + 1, params=params, opt_state=of_optimizer)

    wanted = setting.params
    for seed in range(3):
        state, wanted = step(state, setting.batch(seed)), setting.right(wanted, setting.batch(seed))
    jax.tree.map(np.testing.assert_array_equal, state.params, wanted)


@pytest.mark.parametrize("wrap", [lambda loss: loss, jax.jit, jax.checkpoint])
def test_rows_are_not_differentiated(wrap):
    setting = Setting()

    def penalty(params):
        rows = setting.layer.apply({"params": params["embed"]}, "t", jnp.arange(3), method="rows")
        return jnp.sum(rows**2)

    def of_property(params):
        table = setting.layer.bind({"params": params["embed"]}).embedding_table["t"].table
        return jnp.sum(table[:3] ** 2)

    for loss in (penalty, of_property):
        with pytest.raises(ValueError, match=r"jax.lax.stop_gradient\(params\).*second feature of the same table"):
            jax.grad(wrap(loss))(setting.params)
        with pytest.raises(ValueError, match=r"cannot be differentiated with respect to the tables"):
            jax.jit(jax.value_and_grad(wrap(loss)))(setting.params)
        constant = jax.jit(loss)(setting.params)
        value, gradients = jax.value_and_grad(lambda params, loss=loss: wrap(loss)(jax.lax.stop_gradient(params)))(
            setting.params
        )
        np.testing.assert_allclose(value, constant, rtol=1e-6)
        assert not np.asarray(setting.box(gradients).value["t"].table).any()


def adagrad_reference(table, accumulator, ids, gradient):
    """Tables and accumulators after one step, in float64."""
    rows, touched = oracle.row_gradients(len(table), [(ids, None, gradient)], "sum")
    accumulator = np.where(touched[:, None], accumulator + rows**2, accumulator)
    return np.where(touched[:, None], table - RATE * rows / np.sqrt(accumulator), table), accumulator


def right_loops(setting):
    """Ways to take steps that are right, by name: functions of parameters and two batches."""

    def step(params, packed):
        return setting.step_with(lambda gradients: gradients)(params, packed)

    def nested(params, packed, wrap=jax.jit):
        def gradients(params, packed):
            return jax.grad(wrap(setting.loss))(params, packed)

        return setting.step_with(lambda gradients: gradients, gradients)(params, packed)

    def scan(params, *batches):
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        return jax.lax.scan(lambda params, packed: (step(params, packed), None), params, stacked)[0]

    def both(function):
        return lambda params, *batches: functools.reduce(function, batches, params)

    two_jits = setting.step_with(lambda gradients: gradients, jax.jit(setting.gradients))
    return {
        "jit": both(jax.jit(step)),
        "no jit": both(step),
        "gradients from a jitted function": both(two_jits),
        "scan": jax.jit(scan),
        "jit in jit": both(jax.jit(nested)),
        "gradients from jit in jit": both(jax.jit(two_jits)),
        "checkpoint": both(jax.jit(functools.partial(nested, wrap=jax.checkpoint))),
        "identity": both(jax.jit(setting.step_with(functools.partial(jax.tree.map, lambda leaf: leaf * 1.0)))),
    }


@SLOW
@pytest.mark.parametrize("loop", range(8))
def test_right_steps_train_like_a_dense_reference(loop):
    setting = Setting()
    name, take = list(right_loops(setting).items())[loop]
    batches = [setting.batch(seed) for seed in range(2)]
    got = take(setting.params, *batches)
    table, accumulator = oracle.tables_of(setting.before, setting.layer.placed_specs)["t"]
    bias = np.asarray(setting.params["bias"], np.float64)
    for seed in range(2):
        ids = setting.ids(seed)["t"]
        gradient = 2 * (oracle.lookup(table, ids, "sum") + bias - 1) / (BATCH * DIM)
        table, accumulator = adagrad_reference(table, accumulator, ids, gradient)
        bias = bias - RATE * gradient.sum(0)
    found = oracle.tables_of(setting.tables(got), setting.layer.placed_specs)["t"]
    np.testing.assert_allclose(found[0], table, rtol=1e-4, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(found[1], accumulator, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got["bias"], bias, rtol=1e-4, atol=1e-5)
    setting.layer.apply({"params": got["embed"]}, batches[0])  # Nothing is found.


@SLOW
def test_a_dense_gradient_without_a_lookup_is_found():
    setting = Setting()
    step = setting.step_with(lambda gradients: gradients, jax.grad(functools.partial(of_all_parameters, setting)))
    setting.check_found_in_jit(jax.jit(step)(setting.params), "A dense gradient was added")
    unused = setting.step_with(lambda gradients: gradients, jax.grad(lambda params: jnp.sum(params["bias"] ** 2)))
    for take in (unused, jax.jit(unused)):
        after = take(setting.params)
        setting.unchanged(after)
        np.testing.assert_array_equal(setting.box(after).witness, setting.box(setting.params).witness)


@SLOW
@pytest.mark.parametrize("options", [{"devices": 2}, {"frozen": ("t",)}, {"skip_nonfinite": True}, {"half": True}, {}])
def test_options_of_the_layer(options):
    options = dict(options)
    half = options.pop("half", False)
    stacks = ("t", "u") if "frozen" in options else ("t",)
    setting = Setting(stacks=stacks, enable_minibatching="skip_nonfinite" in options, **options)
    if half:
        setting.params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), setting.params)
        setting.before = setting.tables(setting.params)
    right, batch = setting.right(setting.params, setting.batch(0)), setting.batch(1)
    right = setting.right(right, batch)
    assert setting.right._cache_size() == 1
    last = "u" if "frozen" in options else "t"
    assert (np.asarray(setting.box(right).value[last].table) != setting.before[last].table).any()
    by_value = setting.step_with(lambda gradients: gradients, jax.jit(setting.gradients))
    for take in (by_value, jax.jit(by_value)):
        got = take(take(setting.params, setting.batch(0)), batch)
        jax.tree.map(np.testing.assert_array_equal, setting.tables(got), setting.tables(right))
    setting.layer.apply({"params": got["embed"]}, batch)
    for recipe in ("L2 on all rows", "scale"):
        gradients, _ = RECIPES[recipe]
        step = setting.step_with(lambda gradients: gradients, functools.partial(gradients, setting))
        setting.check_found_in_jit(jax.jit(step)(setting.params, batch), RECIPES[recipe][1])


@SLOW
def test_frozen_tables_are_looked_up_any_number_of_times():
    setting = Setting(frozen=True)
    step = setting.step_with(lambda gradients: gradients, functools.partial(twice_in_nested_jit, setting))
    after = jax.jit(step)(setting.params, setting.batch(0))
    for params in (after, step(setting.params, setting.batch(0))):
        setting.unchanged(params)
        setting.layer.apply({"params": params["embed"]}, setting.batch(0))


def test_the_average_of_parameters_over_steps_can_be_used():
    setting = Setting()
    average = setting.params
    for seed in range(20):
        params = setting.right(setting.params, setting.batch(seed))
        average = optax.incremental_update(params, average, 0.1)
    setting.layer.apply({"params": average["embed"]}, setting.batch(0))


@SLOW
def test_two_layers_are_judged_on_their_own():
    settings = [Setting(), Setting()]
    params = {name: setting.params for name, setting in zip("ab", settings, strict=True)}
    optimizer = create_optimizer_for_sc_model(params, optax.sgd(RATE))
    state = optimizer.init(params)

    @jax.jit
    def step(params, packed):
        def loss(params):
            a, b = (setting.loss(params[name], packed) for name, setting in zip("ab", settings, strict=True))
            return a + b + tied(settings[0], params["a"])

        updates, _ = optimizer.update(jax.grad(loss)(params), state, params)
        return apply_updates_for_sc_model(params, updates)

    after = step(params, settings[0].batch(0))
    settings[0].check_found_in_jit(after["a"], "A dense gradient")
    right = settings[1].right(settings[1].params, settings[1].batch(0))
    jax.tree.map(np.testing.assert_array_equal, settings[1].tables(after["b"]), settings[1].tables(right))


@pytest.mark.parametrize("to_numpy", [jax.device_get, lambda tree: from_bytes(tree, to_bytes(tree))])
def test_numpy_leaves(to_numpy):
    setting = Setting()
    params, packed, layer = to_numpy(setting.params), setting.batch(0), setting.layer
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(params))
    wanted, bound = {"params": setting.params["embed"]}, {"params": params["embed"]}
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(layer.apply(bound, packed), layer.apply(wanted, packed))
    same(layer.apply(bound, setting.ids(0)), layer.apply(wanted, packed))
    same(layer.apply(bound, "t", [1, 2], method="rows"), layer.apply(wanted, "t", [1, 2], method="rows"))
    gradients = {"t": np.ones((BATCH, DIM), np.float32)}
    updated = [layer.apply(of, gradients, packed, method="apply_gradient") for of in (bound, wanted)]
    same(*updated)
    right = setting.right(setting.params, packed)
    same(setting.right(params, packed), right)
    step = setting.step_with(to_numpy, jax.jit(setting.gradients))
    same(setting.tables(step(params, packed)), setting.tables(right))
    same(
        setting.tables(setting.step_with(lambda gradients: gradients)(params, packed)),
        setting.tables(step(params, packed)),
    )
    values = np.ones((2, DIM), np.float32)
    same(layer.set_rows(params["embed"], "t", [1, 2], values), layer.set_rows(wanted["params"], "t", [1, 2], values))
    table = np.ones((VOCABULARY, DIM), np.float32)
    same(layer.load(params["embed"], {"t": table}), layer.load(wanted["params"], {"t": table}))


def test_a_witness_of_another_shape():
    setting = Setting()
    box = setting.box(setting.params)
    params = {EMBEDDING_PARAM_NAME: box.replace(witness=jnp.zeros((1, 1)))}
    with pytest.raises(ValueError, match=r"The witness beside the tables has the shape \(1, 1\)"):
        setting.layer.apply({"params": params}, setting.batch(0))


def test_tables_without_a_box_are_judged_in_the_trace():
    setting = Setting()
    params = nn.meta.unbox(setting.params)

    def step(change):
        def of(params, packed):
            return apply_updates_for_sc_model(params, change(setting.gradients(params, packed)))

        return jax.jit(of)

    after = step(lambda gradients: gradients)(params, setting.batch(0))
    right = setting.right(setting.params, setting.batch(0))
    jax.tree.map(np.testing.assert_array_equal, after["embed"][EMBEDDING_PARAM_NAME], setting.box(right).value)
    with pytest.raises(ValueError, match="The new tables are not those that the backward pass returned"):
        step(functools.partial(jax.tree.map, lambda leaf: leaf / 2))(params, setting.batch(0))


def test_steps_decided_by_identity_are_in_place():
    """Steps that look nothing up, too; their compilation does not read tables."""
    memories = []
    for vocabulary in (1 << 12, 1 << 14):
        table = oracle.table_spec("t", vocabulary, DIM, "sum", embax.AdagradOptimizerSpec(RATE))
        setting = Setting()
        setting.layer = SparseCoreEmbed({"t": oracle.feature_spec("t", table, BATCH)})
        packed = setting.batch(0)
        params = {**setting.params, "embed": setting.layer.init(jax.random.key(0), packed)["params"]}
        right = setting.step_with(lambda gradients: gradients)
        unused = setting.step_with(lambda gradients: gradients, lambda params, _: jax.tree.map(jnp.zeros_like, params))

        def scan(params, packed, right=right):
            return jax.lax.scan(lambda params, _: (right(params, packed), None), params, length=3)[0]

        compiled = []
        for step in (right, scan, unused):
            with warnings.catch_warnings():
                if step is unused:
                    warnings.simplefilter("ignore", embax.SlowPathWarning)
                compiled.append(jax.jit(step, donate_argnums=0).lower(params, packed).compile().memory_analysis())
        of_tables = sum(leaf.nbytes for leaf in jax.tree.leaves(setting.box(params).value))
        assert all(memory.alias_size_in_bytes >= of_tables for memory in compiled)
        memories.append([memory.temp_size_in_bytes for memory in compiled])
    assert memories[0] == memories[1]
