from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from moeless.core.cluster import ModelShape
from moeless.core.errors import ConfigError, MoelessError
from moeless.core.policy import (
    UNLIMITED,
    AffinityPlacer,
    CvScaler,
    LossyOptions,
    MinimalMovesPlacer,
    MinMaxScaler,
    Policy,
    ResolvedPolicy,
    Rule,
    Settings,
    load_policy,
    parse_policy,
    policy_schema,
    resolve,
)
from moeless.core.policy.values import indices_in, memory_bytes

MODEL = ModelShape(num_layers=4, num_experts=8, top_k=2, expert_bytes=100, hidden_bytes=10)
GOLDEN = Path(__file__).parents[3] / "docs" / "policy.schema.json"


def resolved(document: dict[str, Any], *, model_id: str = "") -> ResolvedPolicy:
    return resolve(parse_policy(document), MODEL, model_id=model_id)


def message_of(document: object) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_policy(document)
    assert isinstance(caught.value, MoelessError)
    return str(caught.value)


def test_an_empty_policy_is_what_is_built_in() -> None:
    policy = resolved({})
    assert (policy.tick_s, policy.budget, policy.max_moves) == (1.0, UNLIMITED, None)
    assert isinstance(policy.scaler, MinMaxScaler)
    assert isinstance(policy.placer, MinimalMovesPlacer)
    assert policy.lossy is None
    assert policy.min_LE.shape == (4, 8)
    assert set(policy.min_LE.ravel()) == {1}
    assert set(policy.max_LE.ravel()) == {UNLIMITED}
    assert policy.scale_to_zero_LE.all()


def test_documents_are_in_camel_case_and_python_in_snake_case() -> None:
    policy = parse_policy({"tickSeconds": 2, "rules": [{"layers": "0-1", "minReplicas": 2}]})
    assert policy == Policy(tick_seconds=2, rules=(Rule(layers="0-1", min_replicas=2),))
    assert policy.model_dump(by_alias=True, exclude_none=True, exclude_unset=True) == {
        "tickSeconds": 2.0,
        "rules": ({"layers": "0-1", "minReplicas": 2},),
    }


def test_a_policy_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        Policy().tick_seconds = 3.0  # type: ignore[misc]  # that is the point


def test_later_rules_override_earlier_ones_where_both_apply() -> None:
    policy = resolved(
        {
            "defaults": {"maxReplicas": 4},
            "rules": [
                {"layers": "1-2", "maxReplicas": 6, "keepAliveSeconds": 5},
                {"layers": "2", "experts": "0,6-", "maxReplicas": 7},
            ],
        }
    )
    assert policy.max_LE.tolist() == [[4] * 8, [6] * 8, [7, 6, 6, 6, 6, 6, 7, 7], [4] * 8]
    assert policy.keep_alive_s_LE[:, 0].tolist() == [30, 5, 5, 30]


def test_a_rule_for_models_applies_to_those_only() -> None:
    document = {"rules": [{"models": ["gpt-oss-*", "mixtral"], "minReplicas": 2, "scaler": {"name": "cv"}}]}
    assert resolved(document, model_id="gpt-oss-20b").min_LE.min() == 2
    assert isinstance(resolved(document, model_id="mixtral").scaler, CvScaler)
    assert resolved(document, model_id="Mixtral").min_LE.max() == 1
    assert resolved(document).min_LE.max() == 1


def test_budgets_become_instances() -> None:
    policy = resolved(
        {
            "defaults": {"memoryBudget": "25%", "layerMemoryBudget": 350},
            "rules": [{"layers": "3", "layerMemoryBudget": "150%"}, {"layers": "2", "layerMemoryBudget": "1Ki"}],
        }
    )
    assert policy.budget == 8
    assert policy.layer_budget_L.tolist() == [3, 3, 10, 12]


def test_the_placer_may_go_by_affinity() -> None:
    placer = resolved({"defaults": {"placer": {"name": "affinity", "objective": "hops", "maxImbalance": 1.2}}}).placer
    assert placer == AffinityPlacer(name="affinity", objective="hops", max_imbalance=1.2, min_gain=0.002)
    with pytest.raises(ConfigError, match="placer"):
        resolved({"defaults": {"placer": {"name": "affinity", "maxImbalance": 0.5}}})


def test_every_setting_reaches_the_arrays() -> None:
    policy = resolved(
        {
            "tickSeconds": 0.5,
            "defaults": {
                "scaleToZero": False,
                "keepAliveSeconds": 0,
                "forecastQuantile": 0.75,
                "scaleUpStabilizationSeconds": 3,
                "scaleDownStabilizationSeconds": 300,
                "cvTarget": 0.1,
                "scaler": {"name": "minMax", "workerShare": 0.25},
                "placer": {"name": "localityFirst"},
                "maxMovesPerTick": 0,
                "benefitThreshold": 0.5,
                "lossy": {"capacityFactor": 1.5, "overflow": "reroute"},
            },
            "rules": [{"layers": "1", "cvTarget": 0.3}],
        }
    )
    assert policy.tick_s == 0.5
    assert not policy.scale_to_zero_LE.any()
    for array_LE, value in (
        (policy.keep_alive_s_LE, 0),
        (policy.forecast_quantile_LE, 0.75),
        (policy.up_window_s_LE, 3),
        (policy.down_window_s_LE, 300),
    ):
        np.testing.assert_array_equal(array_LE, np.full((4, 8), value))
    assert policy.max_cv_L.tolist() == [0.1, 0.3, 0.1, 0.1]
    assert (policy.scaler.name, policy.placer.name) == ("minMax", "localityFirst")
    assert (policy.max_moves, policy.benefit_threshold) == (0, 0.5)
    assert policy.lossy == LossyOptions(capacity_factor=1.5, overflow="reroute")


def test_capacity_is_rounded_up() -> None:
    assert LossyOptions(capacity_factor=1.25).capacity(num_tokens=10, top_k=2, num_experts=8) == 4


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"spec": {"rules": [{}, {}, {"minReplicas": 3, "maxReplicas": 2}]}},
            "spec.rules[2].maxReplicas must be >= minReplicas (3), got 2",
        ),
        ({"bogus": 1}, "bogus must not be given: no such field"),
        ({"rules": [{"min_replicas": 1}]}, "rules[0].min_replicas must not be given: no such field"),
        ({"defaults": {"minReplicas": 0}}, "defaults.minReplicas must be greater than or equal to 1, got 0"),
        ({"defaults": {"minReplicas": True}}, "defaults.minReplicas must be a valid integer, got True"),
        (
            {"defaults": {"keepAliveSeconds": float("inf")}},
            "defaults.keepAliveSeconds must be a finite number",
        ),
        ({"tickSeconds": "1"}, "tickSeconds must be a valid number, got '1'"),
        ({"defaults": {"scaler": {"name": "x"}}}, "defaults.scaler.name must be one of 'cv', 'minMax', 'benefit'"),
        ({"defaults": {"scaler": {}}}, "defaults.scaler.name must be given"),
        (
            {"defaults": {"scaler": {"name": "benefit", "workerShare": 2.0}}},
            "defaults.scaler.workerShare must be less than or equal to 1, got 2.0",
        ),
        (
            {"defaults": {"memoryBudget": "12Q"}},
            "defaults.memoryBudget must be bytes, with a unit (12Gi, 500M) or a share (25%), got '12Q'",
        ),
        ({"defaults": {"memoryBudget": -1}}, "defaults.memoryBudget must be bytes"),
        ({"defaults": {"lossy": {}}}, "defaults.lossy.capacityFactor must be given"),
        ({"rules": [{"layers": "x"}]}, "rules[0].layers must look like '0-3,7,20-', got 'x'"),
        ({"rules": [{"models": []}]}, "rules[0].models must hold at least 1, got []"),
        ({"rules": {}}, "rules must be a list, got {}"),
        ({"defaults": 3}, "defaults must be a mapping of fields, got 3"),
        ({"spec": None}, "spec must be a mapping of fields, got None"),
        ([], "policy must be a mapping of fields, got []"),
        ({"spec": {}, "extra": 1}, "extra must not be given beside spec"),
        ({"spec": {}, "kind": "Pod"}, "kind must be ExpertScalingPolicy, got 'Pod'"),
        (
            {"rules": [{"experts": "0-3", "cvTarget": 0.1}]},
            "rules[0].cvTarget must be set for whole layers, got a rule for experts '0-3'",
        ),
        (
            {"rules": [{"layers": "0", "memoryBudget": "1Gi"}]},
            "rules[0].memoryBudget must be set for whole models, got a rule for layers '0'",
        ),
    ],
)
def test_what_is_wrong_is_told_with_its_path(document: object, message: str) -> None:
    assert message_of(document).startswith(message)


def test_everything_wrong_is_told_at_once() -> None:
    told = message_of({"tickSeconds": 0, "defaults": {"cvTarget": -1}})
    assert "tickSeconds must be greater than 0" in told
    assert "defaults.cvTarget must be greater than or equal to 0" in told


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"defaults": {"minReplicas": 3}, "rules": [{"layers": "1", "experts": "2", "maxReplicas": 2}]},
            "rules[0].maxReplicas must be >= minReplicas (3) of L01.E002, got 2",
        ),
        ({"rules": [{"layers": "2-4", "minReplicas": 1}]}, "rules[0].layers must be below 4, got '2-4'"),
        ({"rules": [{"experts": "8", "minReplicas": 1}]}, "rules[0].experts must be below 8, got '8'"),
        ({"rules": [{"experts": "5-3", "minReplicas": 1}]}, "rules[0].experts must be ranges from a lower"),
        (
            {"defaults": {"scaleToZero": False}, "rules": [{"layers": "2", "layerMemoryBudget": 799}]},
            "layerMemoryBudget must have room for the 8 instances that layer 2 never goes below, got room for 7",
        ),
        (
            {"defaults": {"scaleToZero": False, "memoryBudget": "50%"}},
            "memoryBudget must have room for the 32 instances that the model never goes below, got room for 16",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(document: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(document)
    assert str(caught.value).startswith(message)


def test_a_file_may_hold_a_kubernetes_resource(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(
        "apiVersion: moeless.io/v1alpha1\nkind: ExpertScalingPolicy\nmetadata: {name: mine}\n"
        "spec:\n  defaults:\n    cvTarget: 0.3\n"
    )
    assert load_policy(path) == Policy(defaults=Settings(cv_target=0.3))


def test_an_empty_file_is_an_empty_policy(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("# nothing\n")
    assert load_policy(path) == Policy()


def test_a_files_errors_begin_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("rules: [")
    with pytest.raises(ConfigError, match=r"policy.yaml: must be YAML, got .*line 1"):
        load_policy(path)
    path.write_text("tickSeconds: -1")
    with pytest.raises(ConfigError, match=r"policy.yaml: tickSeconds must be greater than 0, got -1"):
        load_policy(path)


def test_the_published_schema_is_that_of_the_code() -> None:
    assert json.loads(GOLDEN.read_text()) == policy_schema(), "run: moeless policy schema > docs/policy.schema.json"


@given(value=st.integers(0, 10**6), unit=st.sampled_from(["k", "M", "G", "T", "Ki", "Mi", "Gi", "Ti"]))
def test_amounts_of_memory_are_exact(value: int, unit: str) -> None:
    base = 1024 if unit.endswith("i") else 1000
    assert memory_bytes(f"{value}{unit}", whole_bytes=1) == value * base ** (
        "kMGT".index(unit[0].replace("K", "k")) + 1
    )


def test_a_share_is_of_the_whole() -> None:
    assert memory_bytes("12.5%", whole_bytes=800) == 100


@given(st.sets(st.integers(0, 30), min_size=1))
def test_ranges_name_what_they_list(indices: set[int]) -> None:
    assert indices_in(",".join(map(str, sorted(indices, reverse=True))), count=31) == sorted(indices)
    assert indices_in(f"{min(indices)}-", count=31) == list(range(min(indices), 31))
