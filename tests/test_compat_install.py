import subprocess
import sys

import pytest


def run(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)


INSTALLED = """
import embax.compat
embax.compat.install()
embax.compat.install()
"""


def test_both_names_give_the_same_modules():
    done = run(
        INSTALLED
        + """
import sys
import embax.compat.sparsecore.lib.nn.embedding as ours
from jax_tpu_embedding.sparsecore.lib.nn import embedding, table_stacking
import jax_tpu_embedding
import jax_tpu_embedding.sparsecore.lib.fdo.csv_file_fdo_client
import embax.compat.sparsecore.utils.utils
import jax_tpu_embedding.sparsecore.utils.utils
assert jax_tpu_embedding is embax.compat
assert embedding is ours and ours.__spec__.name == ours.__name__ == "embax.compat.sparsecore.lib.nn.embedding"
assert embedding.table_stacking is table_stacking
aliases = [name for name in sys.modules if name.partition(".")[0] == "jax_tpu_embedding"]
assert len(aliases) >= 6
for name in aliases:
    assert sys.modules[name] is sys.modules["embax.compat" + name.removeprefix("jax_tpu_embedding")], name
assert jax_tpu_embedding.sparsecore.__version__ == jax_tpu_embedding.sparsecore.version.__version__
assert not {"flax", "optax", "orbax", "google.protobuf"} & set(sys.modules)
try:
    import jax_tpu_embedding.sparsecore.lib.nothing
except ModuleNotFoundError as error:
    assert error.name == "jax_tpu_embedding.sparsecore.lib.nothing"
else:
    raise AssertionError
"""
    )
    assert done.returncode == 0, done.stderr


def test_the_layers_are_found_too():
    done = run(
        INSTALLED
        + """
from jax_tpu_embedding.sparsecore.lib.flax.linen import embed, embed_optimizer
from jax_tpu_embedding.sparsecore.lib.flax.nnx import embed as nnx_embed
import embax.compat.sparsecore.lib.flax.linen.embed as ours
assert embed is ours and nnx_embed.__name__ == "embax.compat.sparsecore.lib.flax.nnx.embed"
assert embed_optimizer.create_optimizer_for_sc_model
"""
    )
    assert done.returncode == 0, done.stderr


def test_what_has_been_imported_already_is_not_replaced(tmp_path):
    (tmp_path / "jax_tpu_embedding").mkdir()
    (tmp_path / "jax_tpu_embedding" / "__init__.py").touch()
    done = run(f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import jax_tpu_embedding" + INSTALLED)
    assert "RuntimeError: embax.compat.install: jax_tpu_embedding has been imported from" in done.stderr
    done = run(
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})" + INSTALLED + "from jax_tpu_embedding import sparsecore"
    )
    assert done.returncode == 0, done.stderr  # What is installed and not imported is left aside.


def test_without_it_there_is_no_such_module():
    assert "No module named" in run("import embax.compat; import jax_tpu_embedding").stderr or pytest.importorskip(
        "jax_tpu_embedding"
    )
