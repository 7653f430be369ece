"""TPUs that are only described: libtpu compiles for them on a machine without one."""

import os

# Before libtpu is loaded: it would ask the network what it runs on.
os.environ.update(TPU_SKIP_MDS_QUERY="1", TPU_ACCELERATOR_TYPE="v5p-8", TPU_WORKER_HOSTNAMES="localhost")

import jax
import numpy as np
import pytest
from jax.experimental import topologies


@pytest.fixture(scope="session", params=["v5p", "v6e"])
def chips(request):
    """The four chips of a host."""
    return topologies.get_topology_desc(platform="tpu", topology_name=f"{request.param}:2x2x1").devices


@pytest.fixture(params=[1, 4], ids=["one chip", "four chips"])
def mesh(request, chips):
    return jax.sharding.Mesh(np.array(chips[: request.param]), ("chips",))
