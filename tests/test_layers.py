"""Both layers, for Linen and NNX, in what they share: meshes, frozen tables, rows, precision, what JAX may do with them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from flax import nnx

import embax
import embax.linen.embed as linen_embed
import embax.nnx.embed as nnx_embed

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, DIM = 16, 8
OPTIMIZERS = (embax.AdagradOptimizerSpec(0.1), embax.RowWiseAdagradOptimizerSpec(0.1))


def feature_specs(optimizers=OPTIMIZERS, vocabulary=60, batch=BATCH, **fields):
    shared = oracle.table_spec("shared", vocabulary, DIM, "mean", optimizers[0], **fields)
    other = oracle.table_spec("other", vocabulary // 2, DIM, "sum", optimizers[1], **fields)
    return {
        "a": oracle.feature_spec("a", shared, batch),
        "b": oracle.feature_spec("b", shared, batch),
        "c": oracle.feature_spec("c", other, batch),
    }


def draw(seed=0, batch=BATCH):
    rng = np.random.default_rng(seed)
    ids = {name: rng.integers(-1, 30, (batch, 3)).astype(np.int32) for name in "abc"}
    return ids, rng.standard_normal((batch, DIM)).astype(np.float32)


def loss_of(activations, targets):
    return sum(jnp.mean((leaf.astype(jnp.float32) - targets) ** 2) for leaf in jax.tree.leaves(activations))


class Nnx:
    """A layer and a dense bias under `nnx.jit`."""

    name = "nnx"

    def __init__(self, specs, seed=0, **options):
        class Model(nnx.Module):
            def __init__(self):
                self.embed = nnx_embed.SparseCoreEmbed(specs, rngs=nnx.Rngs(seed), **options)
                self.bias = nnx.Param(jnp.zeros(DIM))

        self.model = Model()
        self.optimizer = nnx.Optimizer(self.model, optax.sgd(0.1), wrt=nnx.Param)
        self.layer = self.model.embed
        if mesh := options.get("mesh"):  # As a step returns them.
            for node in (self.model, self.optimizer):
                state = nnx.state(node, nnx_embed.is_non_embedding_variables)
                nnx.update(node, jax.device_put(state, nnx_embed.get_named_sharding(state, mesh)))

        @nnx.jit
        def step(model, optimizer, inputs, targets, number):
            def loss(model):
                activations = model.embed(inputs, number)
                return loss_of(jax.tree.map(lambda leaf: leaf + model.bias.get_value(), activations), targets)

            value, gradients = nnx.value_and_grad(loss)(model)
            optimizer.update(model, gradients)
            return value

        self.jitted_step = step
        self.jitted_call = nnx.jit(lambda model, inputs, weights: model.embed(inputs, weights=weights))

    def step(self, inputs, targets, number=None):
        return self.jitted_step(self.model, self.optimizer, inputs, targets, number)

    def __call__(self, inputs, weights=None):
        return self.jitted_call(self.model, inputs, weights)

    def lower(self, inputs, targets):
        return self.jitted_step.lower(self.model, self.optimizer, inputs, targets, jnp.int32(0)).compile().compiled

    @property
    def specs(self):
        return self.layer.feature_specs

    @property
    def variables(self):
        return jax.tree.map(lambda ref: ref[...], self.layer.embedding_table)

    def rows(self, table, ids):
        return self.layer.rows(table, ids)

    def set_rows(self, table, ids, values):
        self.layer.set_rows(table, ids, values)

    def load(self, tables):
        self.layer.load(tables)


class Linen:
    """The same under `jax.jit`."""

    name = "linen"

    def __init__(self, specs, seed=0, **options):
        self.layer = layer = linen_embed.SparseCoreEmbed(specs, **options)
        self.params = {**layer.init(jax.random.key(seed), self._smallest(specs))["params"], "bias": jnp.zeros(DIM)}
        if mesh := options.get("mesh"):  # As a step returns them.
            self.params = jax.device_put(self.params, nn.get_sharding(self.params, mesh))
        optimizer = linen_embed.create_optimizer_for_sc_model(self.params, optax.sgd(0.1))
        self.state = optimizer.init(self.params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, inputs, targets, number):
            def loss(params):
                activations = layer.apply({"params": params}, inputs, number)
                return loss_of(jax.tree.map(lambda leaf: leaf + params["bias"], activations), targets)

            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return linen_embed.apply_updates_for_sc_model(params, updates), state, value

        self.jitted_step = step
        self.jitted_call = jax.jit(
            lambda params, inputs, weights: layer.apply({"params": params}, inputs, weights=weights)
        )

    def _smallest(self, specs):
        devices = self.layer.num_shards
        return self.layer.preprocess(jax.tree.map(lambda feature: np.zeros((devices, 1), np.int32), specs))

    def step(self, inputs, targets, number=None):
        self.params, self.state, value = self.jitted_step(self.params, self.state, inputs, targets, number)
        return value

    def __call__(self, inputs, weights=None):
        return self.jitted_call(self.params, inputs, weights)

    def lower(self, inputs, targets):
        return self.jitted_step.lower(self.params, self.state, inputs, targets, jnp.int32(0)).compile()

    @property
    def specs(self):
        return self.layer.placed_specs

    @property
    def variables(self):
        return self.params["sc_embedding_variables"].value

    @variables.setter
    def variables(self, new):
        box = self.params["sc_embedding_variables"]
        self.params = {**self.params, "sc_embedding_variables": box.replace(value=new)}

    def rows(self, table, ids):
        return self.layer.apply({"params": self.params}, table, ids, method="rows")

    def set_rows(self, table, ids, values):
        self.params = self.layer.set_rows(self.params, table, ids, values)

    def load(self, tables):
        self.params = self.layer.load(self.params, tables)


LAYERS = pytest.mark.parametrize("kind", [Nnx, Linen], ids=lambda kind: kind.name)


def one_table(optimizer=OPTIMIZERS[0], vocabulary=60, batch=BATCH, **fields):
    table = oracle.table_spec("shared", vocabulary, DIM, "mean", optimizer, **fields)
    return {"a": oracle.feature_spec("a", table, batch), "b": oracle.feature_spec("b", table, batch)}


def like(specs, batch):
    ids, targets = batch
    return {name: ids[name] for name in specs}, targets


def mesh_of(*shape, names="xy"):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return jax.sharding.Mesh(devices, tuple(names[: len(shape)]))


def logical(layer):
    return oracle.tables_of(jax.tree.map(np.asarray, layer.variables), layer.specs)


def trained(kind, specs, steps=3, start=None, **options):
    layer = kind(specs, **options)
    if start is not None:
        layer.load({name: arrays[0] for name, arrays in start.items()})
    losses = []
    for number in range(steps):
        ids, targets = like(specs, draw(number))
        losses.append(layer.step(layer.layer.preprocess(ids), targets, jnp.int32(number)))
    return layer, losses


MESHES = {
    "1x2": (mesh_of(1, 2), "x"),
    "explicit 4": (jax.make_mesh((4,), ("x",)), None),
    "2x2": (mesh_of(2, 2), "y"),
    "4 of two axes": (mesh_of(2, 2), ("y", "x")),
}


@functools.cache
def on_one_device(make_specs):
    layer, losses = trained(Nnx, make_specs())
    start = logical(Nnx(make_specs()))
    return start, logical(layer), losses


@pytest.mark.parametrize(("kind", "mesh"), [(Linen, "1x2"), *((Nnx, mesh) for mesh in MESHES)])
def test_any_mesh_trains_like_one_device(kind, mesh):
    make_specs = feature_specs if mesh == "2x2" else one_table
    start, end, losses = on_one_device(make_specs)
    devices, axis = MESHES[mesh]
    layer, got = trained(kind, make_specs(), start=start, mesh=devices, sharding_axis=axis)
    np.testing.assert_allclose(got, losses, rtol=1e-5)
    for name, arrays in logical(layer).items():
        for array, wanted, before in zip(arrays, end[name], start[name], strict=True):
            np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)
            assert (wanted != before).any()
    layer.set_rows("shared", [3, 59], np.arange(2 * DIM).reshape(2, DIM))
    np.testing.assert_array_equal(layer.rows("shared", [[3, 59]])[0], np.arange(2 * DIM).reshape(2, DIM))
    num_devices = layer.specs["a"].table_spec.stacked_table_spec.num_devices
    for array in jax.tree.leaves(layer.layer.embedding_table if kind is Nnx else layer.variables):
        assert array.sharding.shard_shape(array.shape)[0] == array.shape[0] // num_devices


@pytest.mark.parametrize("mesh", [None, "explicit 4"])
def test_linen_and_nnx_give_the_same_bits(mesh):
    options = {} if mesh is None else {"mesh": MESHES[mesh][0]}
    start = on_one_device(one_table)[0]
    layers = [trained(kind, one_table(), start=start, **options) for kind in (Nnx, Linen)]
    assert layers[0][1] == layers[1][1]
    jax.tree.map(np.testing.assert_array_equal, *(logical(layer) for layer, _ in layers))


@pytest.mark.parametrize("axis", ["x", ("x", "y")])
def test_first_values_do_not_depend_on_the_devices(axis):
    mesh, make = mesh_of(2, 2), jax.nn.initializers
    tables = [
        oracle.table_spec(name, 1003 - 100 * number, 5, initializer=initializer, optimizer=OPTIMIZERS[1])
        for number, (name, initializer) in enumerate(
            {"normal": make.normal(1.0), "whole": make.he_normal(), "same": make.constant(2.0)}.items()
        )
    ]
    values = []
    for devices, options in ((1, {}), (2 if axis == "x" else 4, {"mesh": mesh, "sharding_axis": axis})):
        specs = [oracle.feature_spec(table.name, embax.TableSpec(**oracle_fields(table))) for table in tables]
        embax.auto_stack_tables(specs, devices, 4)
        variables = embax.init_embedding_variables(jax.random.key(3), specs, **options)
        values.append(oracle.tables_of(jax.tree.map(np.asarray, variables), specs))
    # XLA may compute what is made as a whole, and not row by row, in another way on another number of devices.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    jax.tree.map(close, *(arrays.pop("whole") for arrays in values))
    jax.tree.map(np.testing.assert_array_equal, *values)
    for array in jax.tree.leaves(variables):
        assert array.sharding == jax.sharding.NamedSharding(mesh, jax.P(axis))
    with pytest.raises(ValueError, match=r"placed for . devices, and tables are to be made on 1. Pass a mesh"):
        embax.init_embedding_variables(jax.random.key(3), specs)


def oracle_fields(table):
    names = ("name", "vocabulary_size", "embedding_dim", "initializer", "optimizer", "combiner")
    return {name: getattr(table, name) for name in names}


def test_each_device_draws_its_own_rows_only():
    from embax import _first_values
    from embax._mesh import TableMesh

    vocabulary = 1 << 20
    devices = _first_values._ManyDevices(16, TableMesh(mesh_of(4), ("x",)), TableMesh(mesh_of(4), ("x",)).sharding(2))
    static = {"initializer": _first_values._ByValue.of(oracle.NORMAL), "chunk_rows": 1 << 14, "dim": DIM}
    table = jax.ShapeDtypeStruct((vocabulary, DIM), jnp.float32, sharding=devices.format)
    key = jax.random.key_data(jax.random.key(0))
    placement = _first_values.RowPlacement(vocabulary, 0, 0)
    memory = (
        _first_values._draw_on_mesh(devices, tuple(static.items()))
        .lower(table, key, placement)
        .compile()
        .memory_analysis()
    )
    assert memory.alias_size_in_bytes == vocabulary * DIM * 4 // 4
    assert memory.temp_size_in_bytes < 16 << 20


@pytest.mark.parametrize(("kind", "mesh"), [(Nnx, None), (Linen, None), (Nnx, mesh_of(4)), (Linen, mesh_of(2))])
def test_steps_and_rows_are_in_place(kind, mesh):
    options = {} if mesh is None else {"mesh": mesh}
    optimizer, memories = embax.AdagradOptimizerSpec(0.1), []
    for vocabulary in (1 << 14, 1 << 16):
        specs = one_table(optimizer, vocabulary, initializer=jax.nn.initializers.zeros)
        layer = kind(specs, skip_nonfinite=True, **options)
        ids, targets = like(specs, draw())
        memory = layer.lower(layer.layer.preprocess(ids), targets).memory_analysis()
        of_tables = 2 * vocabulary * DIM * 4 // (1 if mesh is None else mesh.size)
        assert memory.alias_size_in_bytes >= of_tables
        write = jax.jit(functools.partial(embax.write_rows, specs=layer.specs), donate_argnums=0, static_argnums=1)
        written = write.lower(layer.variables, "shared", np.arange(5), np.ones((5, DIM), np.float32)).compile()
        read = jax.jit(functools.partial(embax.read_rows, specs=layer.specs), static_argnums=1)
        read = read.lower(layer.variables, "shared", np.arange(5)).compile()
        assert written.memory_analysis().alias_size_in_bytes == of_tables
        memories.append([c.temp_size_in_bytes for c in (memory, written.memory_analysis(), read.memory_analysis())])
    assert memories[0] == memories[1]


@LAYERS
def test_raw_ids_outside_jit_are_packed(kind):
    layer = kind(one_table())
    ids, _ = like(one_table(), draw())
    weights = jax.tree.map(lambda leaf: np.linspace(0.5, 2, leaf.size, dtype=np.float32).reshape(leaf.shape), ids)
    layer_call = layer.layer if kind is Nnx else functools.partial(layer.layer.apply, {"params": layer.params})
    got = layer_call(ids, weights=weights)
    wanted = layer(layer.layer.preprocess(ids, weights))
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    with pytest.raises(ValueError, match="weights come with ids"):
        layer_call(layer.layer.preprocess(ids), weights=weights)
    with pytest.raises(ValueError, match=r"ids\['b'\] is missing"):
        layer_call({"a": ids["a"]})
    with pytest.raises(ValueError, match=r"ids\['z'\]"):
        layer.layer.preprocess(ids | {"z": ids["a"]})


@LAYERS
@pytest.mark.parametrize("tree", [tuple, list])
def test_trees_of_features_keep_their_structure(kind, tree):
    specs = tree(feature_specs().values())
    layer, ids = kind(specs), tree(draw()[0].values())
    activations = layer(layer.layer.preprocess(ids))
    assert type(activations) is tree
    tables = logical(layer)
    np.testing.assert_allclose(activations[2], oracle.lookup(tables["other"][0], ids[2], "sum"), rtol=1e-5)


@LAYERS
def test_frozen_tables_stay_and_have_no_slots(kind):
    specs = feature_specs()
    layer, _ = trained(kind, specs, steps=0, frozen=("shared",))
    assert layer.variables["shared"].slot == ()
    assert len(layer.variables["other"].slot) == 1
    before = logical(layer)
    ids, targets = draw()
    layer.step(layer.layer.preprocess(ids), targets)
    after = logical(layer)
    np.testing.assert_array_equal(before["shared"][0], after["shared"][0])
    assert (before["other"][0] != after["other"][0]).any()

    whole = kind(specs, frozen=True)
    before = logical(whole)
    for _ in range(2):
        whole.step(whole.layer.preprocess(ids), targets)
    jax.tree.map(np.testing.assert_array_equal, before, logical(whole))
    bias = whole.params["bias"] if kind is Linen else whole.model.bias.get_value()
    assert (np.asarray(bias) != 0).any()

    stacked = feature_specs((OPTIMIZERS[0], OPTIMIZERS[0]))
    stacked["c"].table_spec.combiner = "mean"
    embax.auto_stack_tables(stacked)
    with pytest.raises(ValueError, match=r"Stack 'shared_other' holds frozen tables and others, \['other'\]"):
        kind(stacked, frozen=("shared",))
    with pytest.raises(ValueError, match=r"frozen has \['none'\], which are no tables"):
        kind(specs, frozen=("none",))
    with pytest.raises(ValueError, match="frozen is 'shared'; it must be True, False or a tuple"):
        kind(specs, frozen="shared")


@LAYERS
def test_serving_without_slots_at_any_batch(kind):
    layer, _ = trained(kind, one_table(), steps=1)
    tables = logical(layer)
    if kind is Nnx:
        served = layer.layer.without_slots()
        assert served.embedding_table["shared"].slot == ()
        look_up = nnx.jit(lambda inputs: served(inputs))
    else:
        params = embax.without_slots(layer.params)
        assert params["sc_embedding_variables"].value["shared"].slot == ()
        look_up = jax.jit(lambda inputs: layer.layer.apply({"params": params}, inputs))
    for batch in (1, 3, BATCH + 1):
        ids, _ = like(one_table(), draw(batch, batch))
        activations = look_up(layer.layer.preprocess(ids))
        for name in ids:
            np.testing.assert_allclose(
                activations[name], oracle.lookup(tables["shared"][0], ids[name], "mean"), rtol=1e-5, atol=1e-6
            )
    variables = embax.without_slots(layer.variables)
    with pytest.raises(ValueError, match=r"Stack 'shared' has 1 arrays; AdagradOptimizerSpec needs 2.*Only lookups"):
        embax.apply_gradients(activations, layer.layer.preprocess(ids), variables, specs=layer.specs)


@LAYERS
def test_a_step_with_gradients_that_are_not_finite_is_skipped(kind):
    specs = one_table(max_ids_per_partition=2)
    for options in ({"enable_minibatching": True}, {} if kind is Linen else {"mesh": mesh_of(2)}):
        layer = kind(specs, skip_nonfinite=True, **options)
        ids, targets = like(specs, draw())
        before = logical(layer)
        spoilt = np.array(targets)
        spoilt[-1, 0] = np.inf  # On the last device only.
        layer.step(layer.layer.preprocess(ids), spoilt)
        jax.tree.map(np.testing.assert_array_equal, before, logical(layer))
        if kind is Linen:
            layer.params = {**layer.params, "bias": jnp.zeros(DIM)}
        else:
            layer.model.bias.set_value(jnp.zeros(DIM))
        layer.step(layer.layer.preprocess(ids), targets)
        assert (before["shared"][0] != logical(layer)["shared"][0]).any()


@LAYERS
def test_half_precision(kind):
    specs = one_table(embax.SGDOptimizerSpec(0.5))
    layer = kind(specs, dtype=jnp.bfloat16)
    ids, targets = like(specs, draw())
    packed = layer.layer.preprocess(ids)
    table = logical(layer)["shared"][0]
    activations = layer(packed)
    assert activations["a"].dtype == jnp.bfloat16
    np.testing.assert_allclose(activations["a"], oracle.lookup(table, ids["a"], "mean"), rtol=1e-2, atol=1e-2)
    layer.step(packed, targets)
    assert layer.variables["shared"].table.dtype == jnp.float32
    assert (logical(layer)["shared"][0] != table).any()
    if kind is Nnx:
        return
    # Parameters in half precision are looked up and updated in float32, and come back as they were.
    layer = kind(specs)
    layer.variables = jax.tree.map(lambda array: array.astype(jnp.bfloat16), layer.variables)
    table = logical(layer)["shared"][0].astype(np.float32)
    activations = layer(packed)
    np.testing.assert_allclose(activations["a"], oracle.lookup(table, ids["a"], "mean"), rtol=1e-5, atol=1e-6)
    layer.step(packed, targets)
    assert layer.variables["shared"].table.dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype is int32; it must be a floating point type"):
        kind(specs, dtype=jnp.int32)


@LAYERS
def test_rows_and_tables_of_ones_own(kind):
    layer = kind(one_table(embax.SGDOptimizerSpec(0.1)))
    values = np.random.default_rng(0).standard_normal((60, DIM))
    layer.load({"shared": values})
    np.testing.assert_array_equal(logical(layer)["shared"][0], values.astype(np.float32))
    layer.set_rows("shared", [5, 0], 1.5)
    values[[5, 0]] = 1.5
    np.testing.assert_array_equal(layer.rows("shared", np.arange(60)), values.astype(np.float32))
    inside = jax.jit(
        lambda variables, ids: embax.write_rows(variables, "shared", ids, jnp.zeros(DIM), specs=layer.specs)
    )
    written = embax.read_rows(
        inside(layer.variables, jnp.array([7, 60, -1])), "shared", np.arange(60), specs=layer.specs
    )
    values[7] = 0
    np.testing.assert_array_equal(written, values.astype(np.float32))
    for arguments, message in (
        (("none", [1], 0.0), "There is no table 'none'"),
        (("shared", [1, 2, 1], 0.0), "Table 'shared': id 1 occurs 2 times; give each row one value"),
        (("shared", [60], 0.0), "Table 'shared': id 60 at position .0,. is outside the vocabulary"),
        (("shared", [1], np.zeros((2, DIM))), r"values of its rows have the shape \(2, 8\); they must have \(1, 8\)"),
        (("shared", [1], "x"), "the values of its rows are <U1; they must be real numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_rows(*arguments)
    with pytest.raises(
        ValueError, match=r"array to load is float64\[3, 8\]; it must be a floating point array \[60, 8\]"
    ):
        layer.load({"shared": np.zeros((3, DIM))})
    with pytest.raises(ValueError, match="There is no table 'none'"):
        layer.load({"none": values})


@LAYERS
def test_what_jax_may_do_with_a_layer(kind):
    layer = kind(one_table(embax.SGDOptimizerSpec(0.1)))
    ids, targets = like(one_table(), draw())
    packed = layer.layer.preprocess(ids)
    call = layer.layer if kind is Nnx else functools.partial(layer.layer.apply, {"params": layer.params})
    with pytest.raises(ValueError, match="embax_lookup cannot be mapped by vmap. Make one larger batch instead"):
        jax.vmap(call)(jax.tree.map(lambda array: np.stack([array, array]), packed))

    def new_table(remat):
        layer = kind(one_table(embax.SGDOptimizerSpec(0.1)))
        if kind is Nnx:
            loss = lambda layer: loss_of(layer(packed), targets)  # noqa: E731
            nnx.jit(nnx.grad(nnx.remat(loss) if remat else loss))(layer.layer)
            return layer.variables["shared"].table

        def of_params(params):
            return loss_of(layer.layer.apply({"params": params}, packed), targets)

        new = jax.jit(jax.grad(jax.checkpoint(of_params) if remat else of_params))(layer.params)
        return new["sc_embedding_variables"].value["shared"].table

    plain, remat = (new_table(remat) for remat in (False, True))
    np.testing.assert_array_equal(plain, remat)
    assert (np.asarray(plain) != np.asarray(layer.variables["shared"].table)).any()


@LAYERS
def test_bad_meshes_and_arguments(kind):
    mesh = mesh_of(2, 2)
    for options, message in (
        ({"mesh": mesh}, r"The mesh has the axes \('x', 'y'\), and sharding_axis does not say which"),
        ({"mesh": mesh, "sharding_axis": "z"}, r"sharding_axis is 'z', but the mesh has the axes \('x', 'y'\)"),
        ({"mesh": mesh, "sharding_axis": ("x", "x")}, "a tuple of different ones"),
        ({"sharding_axis": "x"}, "sharding_axis is 'x', and there is no mesh; pass the mesh too"),
        ({"mesh": "x"}, "mesh is a str; it must be a jax.sharding.Mesh"),
        ({"table_sharding_strategy": "DIV"}, "table_sharding_strategy is 'DIV'; it must be 'MOD'"),
        ({"skip_nonfinite": 1}, "skip_nonfinite"),
    ):
        with pytest.raises(ValueError, match=message):
            kind(one_table(), **options)
    layer = kind(one_table(), mesh=mesh, sharding_axis="x")
    with pytest.raises(ValueError, match="Feature 'a' has a batch of 3, which does not divide by the 2 devices"):
        layer.layer.preprocess(like(one_table(), draw(0, 3))[0])
    packed = kind(one_table()).layer.preprocess(like(one_table(), draw())[0])
    with pytest.raises(
        ValueError, match=r"packed for \(devices, SparseCores a device\) \(1, 4\), the specs were placed for \(2, 4\)"
    ):
        layer(packed)


def test_steps_in_flight():
    in_flight = embax.StepsInFlight(2)
    results = [jnp.float32(number) for number in range(4)]
    for result in results:
        in_flight(result)
    assert len(in_flight._results) == 2
    with pytest.raises(ValueError, match="limit"):
        embax.StepsInFlight(0)
