"""An H100 that is only described: XLA compiles for it on a machine without a GPU."""

import pathlib

import pytest
from jax.experimental import topologies


@pytest.fixture(scope="session")
def h100():
    config = (pathlib.Path(__file__).parent / "h100.txtpb").read_text()
    return topologies.get_topology_desc("h100", "cuda", target_config=config, topology="1x1x1").devices[0]
