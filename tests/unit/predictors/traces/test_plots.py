"""The heat map of a trace: what it shows, and that it can be read at any size."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from moeless_predictors.traces import synthetic_trace
from moeless_predictors.traces.plots import load_heatmap, save_load_heatmap
from moeless_predictors.traces.statistics import expert_loads

pytest.importorskip("matplotlib")


def test_cells_are_the_load_over_the_even_load() -> None:
    trace = synthetic_trace(num_sequences=4)
    axes, bar = load_heatmap(trace).axes
    cells = np.asarray(axes.images[0].get_array())
    loads = expert_loads(trace)
    np.testing.assert_allclose(cells, loads / (trace.num_tokens * trace.top_k / trace.num_experts))
    assert axes.get_title() == "synthetic: load of 16 experts, top-2, 256 tokens"
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("expert", "MoE layer", "load / even load")


@pytest.mark.parametrize(("num_layers", "num_experts"), [(1, 2), (58, 256)])
def test_small_and_large_models_are_drawn_with_few_ticks(tmp_path: Path, num_layers: int, num_experts: int) -> None:
    trace = synthetic_trace(
        num_sequences=2, tokens_per_sequence=8, num_layers=num_layers, num_experts=num_experts, top_k=1
    )
    save_load_heatmap(trace, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    axes = load_heatmap(trace).axes[0]
    for ticks in (axes.get_xticks(), axes.get_yticks()):
        assert len(ticks) <= 18
        assert all(float(tick).is_integer() for tick in ticks)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'moeless\[plot\]'"):
        load_heatmap(synthetic_trace(num_sequences=1))
