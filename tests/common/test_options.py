"""Options: flags win over the file, and nothing misspelt is passed over in silence."""

import dataclasses

import pytest

from midilite.commands.infer import InferOptions
from midilite.common.options import build_parser, from_mapping, parse, read_yaml, write_yaml
from midilite.training.options import TrainOptions

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
    options = parse(TrainOptions, ["--config", str(file), "--batch_size", "5"])
    assert (options.learning_rate, options.batch_size) == (1e-3, 5)
    assert options.mi_attention_blocks == ("1", "blocks.2") and options.use_rslora is True


def test_written_options_read_back(tmp_path):
    options = TrainOptions(data_dir="d", mi_attention_blocks=("blocks.1",), learning_rate=3e-5, mask_variants=(0, -2))
    write_yaml(tmp_path / "config.yaml", options)
    assert from_mapping(TrainOptions, read_yaml(tmp_path / "config.yaml"), "x") == options


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1e-4", "c.yaml: unknown key 'learning_rat'; did you mean 'learning_rate'?"),
        ("lora_rnak: 4", "did you mean 'lora_rank'?"),
        ("batch_size: many", "c.yaml: batch_size is 'many' (str), expected int"),
        ("batch_size: 2.5", "batch_size is 2.5 (float), expected int"),
        ("batch_size: true", "batch_size is True (bool), expected int"),
        ("gradient_checkpointing: 1", "gradient_checkpointing is 1 (int), expected bool"),
        ("lora_target_modules: to_q", "lora_target_modules is 'to_q', expected a list of str"),
        (
            "lr_scheduler: cosin",
            "expected one of constant, constant_with_warmup, linear, cosine; did you mean 'cosine'?",
        ),
        ("batch_size: 0", "batch_size is 0, expected at least 1"),
        ("condition_dropout: 1.5", "condition_dropout is 1.5, expected a probability"),
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
