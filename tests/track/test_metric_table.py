"""The metric table: complete, accepted by MLflow, and strict about unknown names."""

import pytest

from vqmoe_megatron.track.metric_table import (
    METRIC_TABLE,
    check_metric_names,
    is_mlflow_name,
    layer_metric_name,
    lookup_metric,
)


def test_every_name_and_its_layer_variant_is_legal():
    names = list(METRIC_TABLE)
    names += [layer_metric_name(name, 3) for name, row in METRIC_TABLE.items() if row.per_layer]
    check_metric_names(names)
    assert layer_metric_name("vq/code_perplexity", 3) == "vq/layer_03/code_perplexity"
    assert (
        layer_metric_name("moe/expert_load_imbalance", 112) == "moe/layer_112/expert_load_imbalance"
    )
    assert lookup_metric("vq/layer_03/dead_codes") is METRIC_TABLE["vq/dead_codes"]


def test_every_row_is_filled_in():
    for name, row in METRIC_TABLE.items():
        assert row.description and row.unit and row.reduction, name


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vq/code_perplexty", "vq/code_perplexity"),
        ("vq/layer_3/code_perplexity", "unknown metric"),  # two digits at least
        ("vq/layer_03/loss", "unknown metric"),
        ("moe/layer_03/code_perplexity", "unknown metric"),
        ("val/layer_03/loss", "unknown metric"),
        ("", "unknown metric"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(name, says):
    with pytest.raises(ValueError, match=says):
        check_metric_names(["loss", name])


def test_an_aggregate_without_layers_has_no_layer_name():
    with pytest.raises(ValueError, match="vq/dead_codes"):
        layer_metric_name("grad_norm", 1)


def test_our_rule_for_mlflow_names_is_mlflows_own():
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    candidates = ["loss", "a b", "a:b", "a.b-c_d", "a/b", "a//b", "/a", "a/", "a@b", "a(b)", "é"]
    candidates += [".", "..", "a/../b", "a/./b", "", "a\n", "x" * 250, "x" * 251, *METRIC_TABLE]
    for name in candidates:
        try:
            validation._validate_metric_name(name)
            validation._validate_length_limit("name", 250, name)
            accepted = name != "é"  # MLflow takes any letter, we keep to ASCII
        except MlflowException:
            accepted = False
        assert is_mlflow_name(name) == accepted, repr(name)
