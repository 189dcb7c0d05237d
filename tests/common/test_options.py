"""Options: flags win over the file, and nothing misspelt is passed over in silence."""

import dataclasses
from pathlib import Path

import pytest

from midilite.commands.infer import InferOptions
from midilite.common.command_line import build_parser, parse
from midilite.common.options import changed_keys, from_mapping, yaml_text
from midilite.common.yaml_file import read_yaml
from midilite.model.folder import ModelFolder
from midilite.training.options import TrainOptions
from midilite.training.preflight import check_ahead

DOCUMENTED = (  # the flags that users already have in their scripts
    "pretrained_model data_dir output_dir batch_size num_epochs learning_rate lora_rank lora_alpha lora_dropout "
    "gradient_accumulation_steps gradient_checkpointing mixed_precision enable_multi_instance_attention "
    "mi_attention_blocks checkpointing_steps save_every_n_epochs resume_from_checkpoint seed config"
).split()


def test_documented_training_flags_are_frozen():
    command = (
        "--pretrained_model m --data_dir d --output_dir o --batch_size 4 --num_epochs 100 --learning_rate 1e-4 "
        "--lora_rank 16 --lora_alpha 16 --lora_dropout 0.1 --gradient_accumulation_steps 1 --gradient_checkpointing "
        "--mixed_precision bf16 --enable_multi_instance_attention --mi_attention_blocks blocks.8 blocks.9 "
        "--checkpointing_steps 500 --save_every_n_epochs 10 --resume_from_checkpoint latest --seed 42"
    )
    options = parse(TrainOptions, command.split())
    assert options.mi_attention_blocks == ("blocks.8", "blocks.9") and options.lora_dropout == 0.1
    flags = {flag for action in build_parser(TrainOptions, "")._actions for flag in action.option_strings}
    assert {f"--{name}" for name in DOCUMENTED} <= flags


def test_documented_inference_flags_are_frozen():
    command = (
        "--pretrained_model m --lora_path a --rgb_image rgb.png --seg_image seg.png --output scene.glb "
        "--num_inference_steps 50 --guidance_scale 7.0 --seed 42"
    )
    options = parse(InferOptions, command.split())
    assert options.lora_path == ("a",) and options.output == "scene.glb"


def test_flags_win_over_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("learning_rate: 1e-3\nbatch_size: 3\nmi_attention_blocks: [1, blocks.2]\nuse_rslora: yes\n")
    options = parse(TrainOptions, ["--config", str(file), "--data_dir", "d", "--batch_size", "5"])
    assert (options.learning_rate, options.batch_size) == (1e-3, 5)
    assert options.mi_attention_blocks == ("1", "blocks.2") and options.use_rslora is True


def test_written_options_read_back(tmp_path):
    options = TrainOptions(data_dir="d", mi_attention_blocks=("blocks.1",), learning_rate=3e-5, mask_variants=(0, -2))
    (tmp_path / "config.yaml").write_bytes(yaml_text(options))
    assert from_mapping(TrainOptions, read_yaml(tmp_path / "config.yaml"), "x") == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-4", "c.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("lora_rnak: 4", "did you mean 'lora_rank'?"),
        ("batch_size: many", "c.yaml: batch_size is 'many' (str), expected int"),
        ("batch_size: 2.5", "batch_size is 2.5 (float), expected int"),
        ("batch_size: true", "batch_size is True (bool), expected int"),
        ("compile: 1", "compile is 1 (int), expected bool"),
        ("gradient_checkpointing: half", "gradient_checkpointing is 'half', expected one of off, full, selective"),
        ("lora_target_modules: to_q", "lora_target_modules is 'to_q', expected a list of str"),
        (
            "lr_scheduler: cosin",
            "expected one of constant, constant_with_warmup, linear, cosine; did you mean 'cosine'?",
        ),
        ("batch_size: 0", "batch_size is 0, expected at least 1"),
        ("condition_dropout: 1.5", "condition_dropout is 1.5, expected at least 0 and at most 1"),
        ("- a\n- b", "c.yaml: holds a list, expected 'key: value' lines"),
        ("a: [", "c.yaml: is not valid YAML"),
    ],
)
def test_mistakes_in_a_file_name_file_key_and_remedy(tmp_path, capsys, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, ["--config", str(file)])
    printed = capsys.readouterr().err
    assert end.value.code == 2 and message in printed and printed.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batchsize", "4"], "unknown argument '--batchsize'; did you mean '--batch_size'?"),
        (["--lora_rank", "x"], "argument --lora_rank: invalid int value: 'x'"),
        (["--mixed_precision", "fp8"], "invalid choice: 'fp8'"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_on_the_command_line(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        parse(TrainOptions, flags)
    assert end.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("cls", [TrainOptions, InferOptions])
def test_every_option_explains_itself(cls):
    for field in dataclasses.fields(cls):
        assert len(field.metadata["help"]) > 8, field.name


def test_inference_options_that_do_not_fit():
    with pytest.raises(ValueError, match="scene.fbx: can't write .fbx; use one of .glb, .obj, .ply, .stl"):
        InferOptions(output="scene.fbx")
    with pytest.raises(ValueError, match="seg_image is given without rgb_image"):
        InferOptions(seg_image="seg.png")
    with pytest.raises(ValueError, match="2 adapters but 3 scales"):
        InferOptions(lora_path=("a", "b"), lora_scale=(1.0, 0.5, 0.2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_rank": "a"}, "^lora_rank is 'a' \\(str\\), expected int$"),
        ({"learning_rate": None}, "^learning_rate is None \\(NoneType\\), expected float$"),
        ({"mask_variants": 2}, "^mask_variants is 2, expected a list of int$"),
        ({"compile": "yes"}, "^compile is 'yes' \\(str\\), expected bool$"),
        ({"lr_scheduler": "cosin"}, "did you mean 'cosine'"),
        ({"batch_size": 0}, "^batch_size is 0, expected at least 1$"),
    ],
)
def test_a_wrong_value_in_python_names_the_option_too(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainOptions(**changes)


def test_harmless_differences_of_type_are_taken(tmp_path):
    options = TrainOptions(data_dir=tmp_path, learning_rate=1, mask_variants=[0, 2])
    assert options.data_dir == str(tmp_path) and options.mask_variants == (0, 2)
    assert type(options.learning_rate) is float


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        ([], "off"),
        (["--gradient_checkpointing"], "full"),
        (["--gradient_checkpointing", "selective"], "selective"),
        (["--gradient_checkpointing", "--recompute", "selective"], "selective"),
        (["--recompute", "selective", "--gradient_checkpointing"], "selective"),
        (["--gradient_checkpointing", "--recompute", "full"], "full"),
        (["--no-gradient_checkpointing"], "off"),
    ],
)
def test_gradient_checkpointing_in_all_its_spellings(flags, value):
    assert parse(TrainOptions, ["--data_dir", "d", *flags]).gradient_checkpointing == value


@pytest.mark.parametrize(
    ("text", "value"), [("true", "full"), ("false", "off"), ("off", "off"), ("selective", "selective")]
)
def test_gradient_checkpointing_in_a_file(tmp_path, text, value):
    file = tmp_path / "c.yaml"
    file.write_text(f"data_dir: d\ngradient_checkpointing: {text}\n")
    assert parse(TrainOptions, ["--config", str(file)]).gradient_checkpointing == value


@pytest.mark.parametrize(
    ("flags", "expected", "said"),
    [
        (["--train_towers"], {"train_image_encoders": True}, "train_towers is called --train_image_encoders now"),
        (
            ["--train_towers", "--lora_tower_targets", "q_proj", "fc1"],
            {"lora_image_encoder_targets": ("q_proj", "fc1")},
            "lora_tower_targets is called --lora_image_encoder_targets now",
        ),
        (["--no-cuda_graphs"], {}, "cuda_graphs is no choice any more"),
        (["--recompute", "selective"], {"gradient_checkpointing": "selective"}, "--gradient_checkpointing now"),
    ],
)
def test_spellings_of_earlier_versions_work_and_say_what_is_written_now(capsys, flags, expected, said):
    options = parse(TrainOptions, ["--data_dir", "d", *flags])
    assert {name: getattr(options, name) for name in expected} == expected
    assert said in capsys.readouterr().err
    assert flags[0] not in build_parser(TrainOptions).format_help()


def test_the_resolved_options_of_an_earlier_version_are_read(tmp_path, capsys):
    """A run's config.yaml as --config, and the options in its checkpoints: what is gone is passed over."""
    saved = {"train_towers": True, "gradient_checkpointing": True, "recompute": "selective", "adam_beta1": 0.9}
    (tmp_path / "config.yaml").write_text("\n".join(f"{k}: {str(v).lower()}" for k, v in saved.items()))
    options = parse(TrainOptions, ["--data_dir", "d", "--config", str(tmp_path / "config.yaml")])
    assert options.train_image_encoders and options.gradient_checkpointing == "selective"
    assert capsys.readouterr().err.count("note: ") == 3
    assert changed_keys({**saved, "data_dir": "d"}, options) == [] and capsys.readouterr().err == ""


def test_help_is_grouped_by_what_a_person_wants_and_says_each_default_once():
    text = build_parser(TrainOptions).format_help()
    titles = ["data:", "adapter:", "optimisation:", "memory and speed:", "evaluation and previews:", "saving:"]
    places = [text.index(f"\n{title}\n") for title in titles]
    assert places == sorted(places) and "default: None" not in text
    assert " ".join(text.split()).count("(default: a GPU when there is one)") == 1, "however wide the terminal is"


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_is_the_word_for_no_value(tmp_path, word):
    """Wherever an option may have none, on the command line and in a file; where `none` is a choice it stays one."""
    file = tmp_path / "a.yaml"
    file.write_text(f"resume_from_checkpoint: {word}\nmax_train_steps: {word}\nquantize_base: none\n")
    flags = ["--config", str(file), "--cache_dir", word, "--mi_attention_blocks", word, "--num_tokens", word]
    options = parse(TrainOptions, ["--data_dir", "x", *flags])
    assert options.resume_from_checkpoint is options.max_train_steps is options.cache_dir is None
    assert options.mi_attention_blocks is options.num_tokens is None and options.quantize_base == "none"
    assert parse(InferOptions, ["--quantize_base", "none", "--solver", "none"]).solver is None


def test_the_template_starts_afresh_and_fits_any_model():
    """Past bug: it resumed, so every change was refused, and it named blocks that the shipped model lacks."""
    file = str(Path(__file__).parents[2] / "examples" / "configs" / "lora_finetune.yaml")
    options = parse(TrainOptions, ["--config", file, "--pretrained_model", "tiny", "--data_dir", "demo"])
    assert options.resume_from_checkpoint is None
    assert check_ahead(ModelFolder("tiny"), options)
