"""The examples of README and docs run, and that of the README learns."""

import pathlib
import re

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
README = ROOT / "README.md"


def test_the_example_runs(standard_promotion):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert np.isfinite(float(names["loss"]))
    assert names["step"] == 49


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_the_pages_run(page, standard_promotion):
    code = "\n".join(re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL))
    exec(compile(code, str(page), "exec"), {})
