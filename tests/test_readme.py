"""The README's example runs, and learns."""

import pathlib
import re

import numpy as np

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_the_example_runs(standard_promotion):
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 25
    names: dict = {}
    exec(compile(code, str(README), "exec"), names)
    assert np.isfinite(float(names["loss"]))
    assert names["step"] == 49
