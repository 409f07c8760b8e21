import pathlib
import re

import numpy as np

ROOT = pathlib.Path(__file__).parent.parent.parent


def test_the_example_of_the_page_runs(capsys):
  text = (ROOT / "docs" / "analysis.md").read_text()
  (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
  names = {}
  exec(code, names)
  assert names["heat"].shape == (2, 32, 32)
  assert 0 < np.min(names["inside"]) <= np.max(names["inside"]) < 1
  assert "effective_rank=" in capsys.readouterr().out
