"""The metric table: complete, accepted by MLflow, strict about unknown names, open to packages."""

import pytest
from toy_package import pretend_installed

from vqmoe_megatron import registry
from vqmoe_megatron.metrics import table
from vqmoe_megatron.metrics.metric import LayerMetric, Metric, is_mlflow_name
from vqmoe_megatron.metrics.table import (
    OUR_METRICS,
    check_metric_names,
    layer_metric,
    layer_metrics,
    lookup_metric,
    metric_table,
)
from vqmoe_megatron.moe import megatron_log


def test_every_name_and_its_layer_variant_is_legal():
    names = [row.name for row in OUR_METRICS]
    names += [row.name_of_layer(3) for row in layer_metrics().values()]
    check_metric_names(names)
    assert len(set(names)) == len(names)
    assert layer_metric("code_perplexity").name_of_layer(3) == "vq/layer_03/code_perplexity"
    load = layer_metric("expert_load_imbalance")
    assert load.name_of_layer(112) == "moe/layer_112/expert_load_imbalance"
    assert lookup_metric("vq/layer_03/dead_codes") is metric_table()["vq/dead_codes"]


def test_what_a_process_has_seen_is_in_the_table():
    for ending in table.SINCE_START_METRICS:
        assert [name for name in table.metric_table() if name.endswith(ending)]


def test_every_row_is_filled_in():
    for row in OUR_METRICS:
        assert row.description and row.unit and row.reduction, row.name


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


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (lambda: Metric("a//b", "x", "1", "none"), "MLflow refuses the metric name 'a//b'"),
        (lambda: LayerMetric("gini", "x", "1"), "'gini' has no per-layer spelling"),
        (lambda: LayerMetric("vq/a/b", "x", "1"), "write group/scalar"),
        (lambda: LayerMetric("vq/gini", "x", "1", "median"), "'median' must be mean or sum"),
        (lambda: LayerMetric("vq/gini", "x", "1", over_steps="mean"), "'mean' last or sum"),
    ],
)
def test_a_row_that_nobody_could_log_is_refused(row, says):
    with pytest.raises(ValueError, match=says):
        row()


def test_our_rule_for_mlflow_names_is_mlflows_own():
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    candidates = ["loss", "a b", "a:b", "a.b-c_d", "a/b", "a//b", "/a", "a/", "a@b", "a(b)", "é"]
    candidates += [".", "..", "a/../b", "a/./b", "", "a\n", "x" * 250, "x" * 251]
    for name in [*candidates, *metric_table()]:
        try:
            validation._validate_metric_name(name)
            validation._validate_length_limit("name", 250, name)
            accepted = name != "é"  # MLflow takes any letter, we keep to ASCII
        except MlflowException:
            accepted = False
        assert is_mlflow_name(name) == accepted, repr(name)


@pytest.fixture
def install(monkeypatch):
    """``install(attribute)``: as if a package had that row of ``toy_package``."""

    def add(attribute):
        pretend_installed(monkeypatch, {"metric.mine": f"toy_package:{attribute}"})

    yield add
    registry._installed.cache_clear()
    table._table.cache_clear()


def test_a_packages_row_is_a_row_everywhere(install):
    assert "usage_gini" not in layer_metrics()
    install("GINI")
    assert layer_metric("usage_gini").unit == "1" and list(metric_table())[-1] == "toy/usage_gini"
    check_metric_names(["toy/usage_gini", "toy/layer_02/usage_gini"])
    assert megatron_log.logged_names()["usage_gini"] == "toy/usage_gini"


@pytest.mark.parametrize(
    ("attribute", "says"),
    [
        ("TAKEN", "metric.mine of group vqmoe_megatron: the name loss, .* is another metric's"),
        ("ALIKE", "metric.mine .* mine/dead_codes, or what stands behind its /"),
        ("Path", "metric.mine .* is a type; it must be an instance of .*metrics.metric.Metric"),
        ("NOTHING", "metric.mine = toy_package:NOTHING .* cannot be loaded: AttributeError"),
    ],
)
def test_a_packages_wrong_row_is_refused_by_name(install, attribute, says):
    install(attribute)
    with pytest.raises(ValueError, match=says):
        metric_table()


def test_megatrons_log_lists_what_is_known_before_the_codebook_moves():
    from vqmoe_megatron.moe import METRIC_NAMES

    assert METRIC_NAMES == {
        "expert_load_imbalance": "moe/expert_load_imbalance",
        "combine_discrete_weight": "vq/combine_discrete_weight",
        "code_perplexity": "vq/code_perplexity",
        "dead_codes": "vq/dead_codes",
        "commitment_loss": "vq/commitment_loss",
        "codebook_loss": "vq/codebook_loss",
        "exact_experts_per_token": "moe/exact_experts_per_token",
        "routing_threshold": "moe/routing_threshold",
        "tokens_without_exact_expert": "moe/tokens_without_exact_expert",
        "tokens_with_one_exact_expert": "moe/tokens_with_one_exact_expert",
        "tokens_with_several_exact_experts": "moe/tokens_with_several_exact_experts",
        "router_topk": "moe/router_topk",
        "dropped_tokens": "moe/dropped_tokens",
        "expert_bias_spread": "moe/expert_bias_spread",
        "distillation_loss": "moe/distillation_loss",
        "light_router_agreement": "moe/light_router_agreement",
        "routing_frozen": "moe/routing_frozen",
        "distinct_rows": "code_memory/distinct_rows",
        "rows_in_use": "code_memory/rows_in_use",
        "top_percent_reads": "code_memory/top_percent_reads",
        "hidden_code_perplexity": "code_memory/hidden_code_perplexity",
        "hidden_dead_codes": "code_memory/hidden_dead_codes",
        "hidden_commitment_loss": "code_memory/hidden_commitment_loss",
        "hidden_codebook_loss": "code_memory/hidden_codebook_loss",
    }
