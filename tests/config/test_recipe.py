"""Recipes: files and overrides become typed values; every mistake names its place and a way out."""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from vqmoe_megatron.config import CodeMemoryConfig, ModelConfig, RunConfig
from vqmoe_megatron.config.recipe import (
    flatten_config,
    load_recipe,
    load_saved_recipe,
    save_recipe,
    text_override,
)


@pytest.fixture
def recipe_file(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "tiny.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def failure(path: Path, *overrides: str) -> str:
    with pytest.raises(ValueError) as caught:
        load_recipe(path, list(overrides))
    return str(caught.value)


def test_file_lies_over_defaults_and_overrides_over_the_file(recipe_file) -> None:
    path = recipe_file("model:\n  num_layers: 8\n  hidden_size: 128\nvq:\n")
    config = load_recipe(path, ["model.num_layers=2", "train.seed=7", "model.num_layers=6"])
    assert (config.model.num_layers, config.model.hidden_size, config.train.seed) == (6, 128, 7)
    assert config.vq == RunConfig().vq  # an empty section means its defaults


def test_the_defaults_are_asked_for_by_an_empty_mapping(recipe_file) -> None:
    assert load_recipe(recipe_file("{}\n"), []) == RunConfig()


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("optimizer.lr=3e-4", "optimizer.lr", 3e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("model.bf16=true", "model.bf16", True),
        ("model.num_query_groups=null", "model.num_query_groups", None),
        ("model.num_query_groups=4", "model.num_query_groups", 4),
        ("model.recompute_modules=[moe,mlp]", "model.recompute_modules", ["moe", "mlp"]),
        ("parallel.sequence_parallel=false", "parallel.sequence_parallel", False),
        ("tracking.run_name=007", "tracking.run_name", "007"),
        ("tracking.run_name=1e-3", "tracking.run_name", "1e-3"),
        ("tracking.run_name=a: b", "tracking.run_name", "a: b"),
        ("tracking.run_name='null'", "tracking.run_name", "null"),
        ("tracking.run_name=a=b", "tracking.run_name", "a=b"),
        ("train.output_dir=runs/my study #1/x", "train.output_dir", "runs/my study #1/x"),
        ("train.output_dir=#1/${train.seed} #2", "train.output_dir", "#1/1234 #2"),
        ("tracking.run_name=&x y", "tracking.run_name", "&x y"),
        ("tracking.run_name=*x", "tracking.run_name", "*x"),
        ("tracking.run_name=[a", "tracking.run_name", "[a"),
        ("tracking.run_name= ~ ", "tracking.run_name", None),
        ("tracking.run_name=~/x", "tracking.run_name", "~/x"),
        ('tracking.run_name=" a\\tb #1"', "tracking.run_name", " a\tb #1"),
        ("tracking.run_name='it''s ${train.seed}'", "tracking.run_name", "it's 1234"),
        ("tracking.run_name=''", "tracking.run_name", ""),
        ("tracking.mlflow_uri=http://host:5000", "tracking.mlflow_uri", "http://host:5000"),
        ("checkpoint.load=null", "checkpoint.load", None),
        ("train.output_dir=runs/${train.seed}", "train.output_dir", "runs/1234"),
    ],
)
def test_override_arrives_typed(recipe_file, override: str, key: str, value: object) -> None:
    section, name = key.split(".")
    got = getattr(getattr(load_recipe(recipe_file("{}"), [override]), section), name)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.num_layers=four", "model.num_layers: expected int, got str 'four'"),
        ("model.num_layers=4.0", "expected int, got float 4.0"),
        ("model.num_layers=true", "expected int, got bool True"),
        ("model.num_layers=", "expected int, got null"),
        ("model.num_query_groups=x", "expected int or null, got str 'x'"),
        ("model.bf16=1", "expected true or false, got int 1"),
        ("optimizer.lr=true", "expected float, got bool True"),
        ("model.recompute_modules=moe", "expected a list of str or null, got str 'moe'"),
        ("model.recompute_modules=[1]", "expected a list of str or null, got list [1]"),
        ("train.output_dir=null", "train.output_dir: expected str, got null"),
        ("train.seed={a: 1}", "expected int, got dict {'a': 1}"),
        ("optimizer.lr=.inf", "optimizer.lr=inf must be a finite number"),
        ("optimizer.lr=-.inf", "optimizer.lr=-inf must be a finite number"),
        ("optimizer.lr=1e999", "optimizer.lr=inf must be a finite number"),
        ("vq.ema_decay=.nan", "vq.ema_decay=nan must be a finite number"),
    ],
)
def test_wrong_type_names_key_value_and_expected_type(recipe_file, override, message) -> None:
    text = failure(recipe_file("{}"), override)
    assert message in text and f"override {override!r}" in text


def test_wrong_type_in_the_file_names_its_line(recipe_file) -> None:
    path = recipe_file("vq:\n  num_codes: 64\n\ntracking:\n  run_name: 007\n")
    assert failure(path) == f"tracking.run_name: expected str or null, got int 7 ({path}:5)"


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("model.fp16=true", ["model.fp16 is refused: a loss scale skips", "model.bf16=true"]),
        ("vq.num_code=3", ["unknown key 'vq.num_code'", "did you mean vq.num_codes"]),
        ("vq.expert_model_parallel_size=2", ["parallel.expert_model_parallel_size"]),
        ("vq.zzz=2", ["none is near", "Keys of vq: num_codes, num_code_slices"]),
        ("vq.num_codes.x=2", ["unknown key 'vq.num_codes.x'", "vq.num_codes"]),
        ("modle.num_layers=3", ["unknown section", "model.num_layers", "Sections: model, vq"]),
        ("seed=3", ["unknown section 'seed'", "did you mean train.seed"]),
        ("vq=3", ["names a whole section", "vq.key=value"]),
        ("vq.num_codes", ["has no `=`", "vq.num_codes=128"]),
        ("model.recompute_modules=[moe", ["malformed value", "line"]),
        ("train.output_dir=${a", ["malformed value", "${a"]),
        ("tracking.mlflow_uri=", ["it is empty; write null for no value"]),
        ("train.output_dir=  ", ["it is empty; write null for no value"]),
        ("train.output_dir='runs' #1", ["not one quoted text"]),
        ("train.output_dir='runs", ["malformed value", "line 1"]),
    ],
)
def test_unknown_or_malformed_override_offers_a_way_out(recipe_file, override, parts) -> None:
    text = failure(recipe_file("{}"), override)
    assert [part for part in [*parts, f"override {override!r}"] if part not in text] == []


@pytest.mark.parametrize(
    ("key", "tail"),
    [("tracking.mlflow_uri", ""), ("tracking.mlflow_url", ""), ("tracking.mlflow_uri", "/${a")],
)
def test_a_password_is_refused_and_never_repeated(recipe_file, key, tail) -> None:
    uri = f"http://user:s3cret@host{tail}"
    section, name = key.split(".")
    for text in (
        failure(recipe_file("{}"), f"{key}={uri}"),
        failure(recipe_file(f"{section}:\n  {name}: {uri}\n")),
    ):
        assert "mlflow_uri" in text and "s3cret" not in text


def test_unknown_names_in_the_file_carry_their_line(recipe_file) -> None:
    path = recipe_file("model:\n  num_layer: 4\nparalel:\n  x: 1\ntrain: 3\n")
    lines = failure(path).splitlines()
    assert lines[0] == f"3 problems in {path}:"
    assert "did you mean model.num_layers" in lines[1] and lines[1].endswith(f"({path}:2)")
    assert "did you mean parallel?" in lines[2] and lines[2].endswith(f"({path}:3)")
    assert "section train must hold `key: value` lines, not 3" in lines[3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [1\nvq: 3", "is not valid YAML: line 2"),
        ("model:\n\tnum_layers: 3", "is not valid YAML: line 2"),
        ("model:\n  seq_length: 1\n  seq_length: 2\n", "line 3, column 3: found duplicate key"),
        ("- model\n", "must hold sections (model, vq"),
        ("3\n", "must hold sections (model, vq"),
        ("x: !!python/object/apply:os.getcwd []", "is not valid YAML: line 1"),
        ("train:\n  seed: ${train.sed}\n", "tiny.yaml:2) cannot be resolved"),
        ("train:\n  seed: ???\n", "tiny.yaml:2) cannot be resolved: Missing mandatory value"),
    ],
)
def test_malformed_file_names_the_line(recipe_file, text: str, message: str) -> None:
    assert message in failure(recipe_file(text))


def test_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.yaml"
    path.write_bytes(b"\xff\xfe\x00\x81")
    assert failure(path) == f"{path} cannot be read as a recipe: it is not text in UTF-8 (byte 0)"


def test_missing_file_lists_the_recipes_near_it(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text("")
    (tmp_path / "recipes" / ".hidden.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    for wrong in ("recipes/quikstart.yaml", "quickstart"):
        text = failure(Path(wrong))
        assert text == f"recipe {wrong} does not exist; recipes here: recipes/quickstart.yaml"
    assert "recipes is a folder, not a recipe file" in failure(Path("recipes"))


def test_rules_see_only_the_final_values(recipe_file) -> None:
    # four slices without the product quantiser are illegal; the override completes them
    path = recipe_file("vq:\n  num_code_slices: 4\n")
    assert "needs vq.quantizer=product" in failure(path)
    assert load_recipe(path, ["vq.quantizer=product"]).vq.num_code_slices == 4


def test_rules_run_once_on_the_given_values(recipe_file, monkeypatch) -> None:
    seen: list[int] = []
    original = ModelConfig.__post_init__

    def counted(self: ModelConfig) -> None:
        seen.append(self.num_layers)
        original(self)

    path = recipe_file("model:\n  num_layers: 8\n")
    monkeypatch.setattr(ModelConfig, "__post_init__", counted)
    load_recipe(path, ["model.num_layers=6"])
    default = ModelConfig.num_layers
    assert [value for value in seen if value != default] == [6]


def test_rules_of_several_sections_are_reported_together(recipe_file) -> None:
    text = failure(
        recipe_file("{}"), "vq.ema_decay=2.0", "train.micro_batch_size=0", "model.hidden_size=3"
    )
    assert text.startswith("3 problems")
    for part in ("vq.ema_decay=2.0", "train.micro_batch_size=0", "3 % 8 = 3"):
        assert part in text


def test_saved_recipe_loads_equal(tmp_path: Path, recipe_file) -> None:
    overrides = [
        "optimizer.adam_eps=1e-12",
        "optimizer.lr=0.30000000000000004",
        "model.recompute_modules=[moe,mlp]",
        "tracking.run_name=1e-3",
        "tracking.experiment=Versuch für Ω: '#1'",
        "checkpoint.load=null",
        "train.output_dir=on",
    ]
    config = load_recipe(recipe_file("{}"), overrides)
    assert config.tracking.run_name == "1e-3" and config.train.output_dir == "on"
    saved = tmp_path / "deep" / "run_config.yaml"
    save_recipe(config, saved)
    assert load_recipe(saved, []) == config
    save_recipe(load_recipe(saved, ["train.seed=5"]), saved)
    assert load_recipe(saved, []).train.seed == 5
    assert [file.name for file in saved.parent.iterdir()] == ["run_config.yaml"]


@pytest.mark.parametrize(
    "text",
    ["a #1", "&x y", "", " a ", "null", "~", "~/a", "'a'", '"', "it's", "a\\b\n", "7", "Ω: 🙂 '"],
)
def test_a_text_override_gives_exactly_its_text(recipe_file, text: str) -> None:
    override = text_override("tracking.run_name", text)
    assert load_recipe(recipe_file("{}"), [override]).tracking.run_name == text
    with pytest.raises(ValueError, match="is not resolved here"):
        text_override("tracking.run_name", text + "${train.seed}")


def test_failed_save_keeps_the_old_file_and_leaves_no_partial(tmp_path: Path, monkeypatch) -> None:
    saved = tmp_path / "run_config.yaml"
    save_recipe(RunConfig(), saved)
    before = saved.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    changed = RunConfig()
    changed.train.seed = 1
    with pytest.raises(OSError, match="No space left"):
        save_recipe(changed, saved)
    assert saved.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["run_config.yaml"]


def test_flat_settings_cover_everything_as_scalars() -> None:
    config = RunConfig()
    config.model.recompute_modules = ["moe", "mlp"]
    flat = flatten_config(config)
    assert flat["model.recompute_modules"] == "moe,mlp"
    assert flat["vq.num_codes"] == 64 and flat["tracking.run_name"] is None
    assert len(flat) == sum(len(section) for section in asdict(config).values())
    assert all(value is None or isinstance(value, (str, int, float)) for value in flat.values())


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("recipes/*.yaml")))
def test_shipped_recipe_is_legal(path: Path) -> None:
    assert isinstance(load_recipe(path, []), RunConfig)


def test_a_saved_recipe_that_was_emptied_or_cut_is_no_recipe_of_defaults(tmp_path):
    saved = tmp_path / "run_config.yaml"
    save_recipe(RunConfig(), saved)
    assert load_saved_recipe(saved) == RunConfig()
    text = saved.read_text()
    for content, missing in (("", "model, vq"), (text[: text.index("tracking:")], "tracking")):
        saved.write_text(content)
        with pytest.raises(ValueError, match=f"emptied or cut: it lacks {missing}"):
            load_saved_recipe(saved)


def test_a_recipe_that_was_saved_before_there_was_a_code_memory(tmp_path: Path) -> None:
    saved = tmp_path / "run_config.yaml"
    save_recipe(RunConfig(), saved)
    sections = OmegaConf.load(saved)
    del sections["code_memory"]
    OmegaConf.save(sections, saved)
    assert load_saved_recipe(saved) == RunConfig()


def test_a_saved_code_memory_is_what_it_was_and_not_today_s_default(tmp_path: Path) -> None:
    older = CodeMemoryConfig(num_rows=64, codes="embedding", num_codes=32, lr_mult=1.0)
    saved = tmp_path / "run_config.yaml"
    save_recipe(RunConfig(code_memory=older), saved)
    assert set(OmegaConf.load(saved).code_memory) == {spec.name for spec in fields(older)}
    assert load_saved_recipe(saved).code_memory == older
