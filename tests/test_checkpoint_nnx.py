import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import nnx

import embax
from embax import checkpoint
from embax._rows import read_rows
from embax._stacking.layout import take_table
from embax._stacking.plan import make_plan
from embax.checkpoint import CheckpointError, _load
from embax.nnx import checkpoint as nnx_checkpoint
from embax.nnx.embed import EmbeddingVariable, PartitionedOptimizer, SparseCoreEmbed


def features(*names, vocabulary_size=50):
    def feature(name):
        table = embax.TableSpec(
            name=name,
            vocabulary_size=vocabulary_size,
            embedding_dim=6,
            initializer=jax.nn.initializers.normal(),
            optimizer=embax.AdagradOptimizerSpec(learning_rate=0.1),
            combiner="mean",
        )
        return embax.FeatureSpec(name=name, table_spec=table, input_shape=(8, 3), output_shape=(8, 6))

    return {name: feature(name) for name in names}


class Model(nnx.Module):
    def __init__(self, seed, *, num_sc=4, hidden=4, extra_layer=False, vocabulary_size=50):
        rngs = nnx.Rngs(seed, dropout=jax.random.key(seed, impl="rbg"))
        self.first = SparseCoreEmbed(
            features("movie", "user", vocabulary_size=vocabulary_size), rngs=rngs, num_sc_per_device=num_sc
        )
        self.towers = nnx.List([SparseCoreEmbed(features("movie"), rngs=rngs, num_sc_per_device=num_sc)])
        self.hidden = nnx.Linear(18, hidden, rngs=rngs)
        self.norm = nnx.BatchNorm(hidden, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(hidden, 1, rngs=rngs)
        if extra_layer:
            self.more = nnx.Linear(1, 1, rngs=rngs)

    def preprocess(self, seed):
        numbers = np.random.default_rng(seed)
        draw = lambda: numbers.integers(0, 50, (8, 3)).astype(np.int32)  # noqa: E731
        first = self.first.preprocess({"movie": draw(), "user": draw()})
        return first, self.towers[0].preprocess({"movie": draw()})

    def __call__(self, packed):
        a, b = self.first(packed[0]), self.towers[0](packed[1])
        x = jnp.concatenate([a["movie"], a["user"], b["movie"]], axis=1)
        return self.out(self.dropout(nnx.relu(self.norm(self.hidden(x)))))[:, 0]


def make(seed=0, **arguments):
    model = Model(seed, **arguments)
    return model, PartitionedOptimizer(model, optax.adam(1e-2))


def loss_of(model, packed):
    return jnp.mean((model(packed) - 1) ** 2)


@nnx.jit
def train_step(model, optimizer, packed):
    loss, gradients = nnx.value_and_grad(loss_of)(model, packed)
    optimizer.update(model, gradients)
    return loss


def train(model, optimizer, steps):
    """Trains; returns the losses, then what the model predicts, then its tables."""
    losses = [float(train_step(model, optimizer, model.preprocess(step))) for step in steps]
    model.eval()
    predictions = model(model.preprocess(1000))
    model.train()
    layers = (model.first, model.towers[0])
    tables = [layer.rows(name, np.arange(50)) for layer in layers for name in layer.feature_specs]
    return [np.asarray(x).astype(np.float32).tobytes().hex() for x in (losses, predictions, *tables)]


def bits(*nodes):
    """Every leaf of the state, as bytes; of tables and slots what belongs to a row."""

    def value(x):
        return np.asarray(
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ).tobytes()

    found = [jax.tree.map(value, nnx.to_pure_dict(nnx.state(n, nnx.Not(EmbeddingVariable)))) for n in nodes]
    for _, layer in nnx.iter_graph(nodes[0]):
        if isinstance(layer, SparseCoreEmbed):
            plan, variables = make_plan(layer.feature_specs), oracle.variables_of(layer)
            for stack in plan.stacks:
                for array in jax.tree.leaves(variables[stack.name]):
                    found += [value(take_table(array, table, plan.num_sparsecores)) for table in stack.tables]
    return found


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A model and its optimizer after three steps, and their checkpoint."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model, optimizer = make()
        train(model, optimizer, range(3))
        path = tmp_path_factory.mktemp("once") / "checkpoint"
        nnx_checkpoint.save(path, model, optimizer)
    return model, optimizer, path


@pytest.fixture
def trained(once, standard_promotion):
    return nnx.clone(once[:2])


@pytest.fixture
def saved(once, tmp_path, standard_promotion):
    """A checkpoint of `trained`."""
    return Path(shutil.copytree(once[2], tmp_path / "checkpoint"))


RESTORED = """
import json, sys
sys.path.insert(0, sys.argv[1])
import test_checkpoint_nnx as t
model, optimizer = t.make(seed=99)
t.nnx_checkpoint.restore(sys.argv[2], model, optimizer)
print(json.dumps([t.train(model, optimizer, []), t.train(model, optimizer, range(3, 6))]))
"""


def test_a_new_process_predicts_and_trains_on_bit_for_bit(saved, trained):
    expected = [train(*trained, []), train(*trained, range(3, 6))]
    command = [sys.executable, "-W", "error", "-c", RESTORED, Path(__file__).parent, saved]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
    assert json.loads(process.stdout) == expected


def test_everything_comes_back(saved, trained):
    model, optimizer = make(seed=1)
    assert bits(model, optimizer) != bits(*trained)
    nnx_checkpoint.restore(saved, model, optimizer)
    assert bits(model, optimizer) == bits(*trained)
    train(model, optimizer, [3])  # the restored arrays can be donated


def test_another_number_of_sparsecores(saved, trained):
    model, optimizer = make(seed=1, num_sc=3)
    nnx_checkpoint.restore(saved, model, optimizer)
    assert train(model, optimizer, [])[2:] == train(*trained, [])[2:]


def test_without_the_optimizer(tmp_path, saved, trained):
    model, optimizer = make(seed=1)
    nnx_checkpoint.restore(saved, model)
    assert bits(model) == bits(trained[0])
    nnx_checkpoint.save(tmp_path / "alone", model)
    nnx_checkpoint.restore(tmp_path / "alone", model)
    with pytest.raises(CheckpointError, match=r"was saved without an optimizer. Restore it without one"):
        nnx_checkpoint.restore(tmp_path / "alone", model, optimizer)


def test_names_of_tables(tmp_path, saved, trained):
    tables = json.loads((saved / "embax.json").read_text())["content"]["tables"]
    assert set(tables) == {"first/movie", "user", "towers.0/movie"}
    layer = trained[0].towers[0]
    nnx_checkpoint.save(tmp_path / "layer", layer)
    variables, _ = checkpoint.load(tmp_path / "layer", specs=layer.feature_specs)
    ids = np.arange(50)
    rows = read_rows(variables, "movie", ids, specs=layer.feature_specs)
    np.testing.assert_array_equal(rows, layer.rows("movie", ids))


def test_ambiguous_names(tmp_path):
    class Odd(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.a = SparseCoreEmbed(features("t"), rngs=rngs)
            self.b = SparseCoreEmbed(features("t", "a/t"), rngs=rngs)

    with pytest.raises(ValueError, match="Two tables of the model would be stored as 'a/t'; rename one of them"):
        nnx_checkpoint.save(tmp_path / "c", Odd())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"extra_layer": True}, r"has no leaf model\.more\.bias, which the template has"),
        (
            {"hidden": 5},
            r"leaf model\.hidden\.bias is stored as array float32\[4\], and the template has array float32\[5\]",
        ),
        ({"vocabulary_size": 51}, "table 'first/movie' is stored with vocabulary_size=50, and the specs say 51"),
    ],
)
def test_another_model_is_refused_and_left_alone(saved, arguments, message):
    model, optimizer = make(seed=1, **arguments)
    before = bits(model, optimizer)
    with pytest.raises(CheckpointError, match=message):
        nnx_checkpoint.restore(saved, model, optimizer)
    assert bits(model, optimizer) == before


def test_another_optimizer_is_refused(saved):
    model, _ = make(seed=1)
    with pytest.raises(CheckpointError, match=r"has no leaf optimizer\.opt_state\.0\.trace\."):
        nnx_checkpoint.restore(saved, model, PartitionedOptimizer(model, optax.sgd(0.1, momentum=0.9)))


@pytest.mark.parametrize("trust_files", [False, True])
def test_a_damaged_checkpoint_changes_nothing(saved, monkeypatch, trust_files):
    """Even when only the last array to be read is damaged, and only the checksum of its values says so."""
    files = (saved / "towers.0%2Fmovie.slot.accumulator").rglob("d/*")
    file = max(files, key=lambda path: path.stat().st_size)
    if trust_files:
        read = _load.read_arrays

        def damaged(directory, names):
            arrays = read(directory, names)
            if directory.name == file.relative_to(saved).parts[0]:
                arrays["value"][-1, -1] += 1
            return arrays

        monkeypatch.setattr(_load, "read_arrays", damaged)
    else:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    model, optimizer = make(seed=1)
    before = bits(model, optimizer)
    with pytest.raises(
        CheckpointError, match=r"is not as it was saved" if trust_files else f"{file.name} has checksum"
    ):
        nnx_checkpoint.restore(saved, model, optimizer)
    assert bits(model, optimizer) == before


def test_tables_alone(tmp_path):
    model = SparseCoreEmbed(features("movie"), rngs=nnx.Rngs(0))
    checkpoint.save(tmp_path / "c", model.embedding_table, specs=model.feature_specs)
    with pytest.raises(CheckpointError, match=r"holds tables alone. Load it with embax.checkpoint.load"):
        nnx_checkpoint.restore(tmp_path / "c", model)


def test_a_model_without_tables(tmp_path):
    model, other = nnx.Linear(2, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 2, rngs=nnx.Rngs(1))
    nnx_checkpoint.save(tmp_path / "c", model)
    nnx_checkpoint.restore(tmp_path / "c", other)
    assert bits(model) == bits(other)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        nnx_checkpoint.save(tmp_path / "c", other)
    nnx_checkpoint.save(tmp_path / "c", other, overwrite=True)
