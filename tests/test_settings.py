"""Settings: what is read, what is refused, and whether the text helps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

from si_distill.errors import InputError
from si_distill.evaluation.config import EvaluationConfig
from si_distill.settings import parse_settings, script_main, settings_from_dict, settings_to_dict
from si_distill.training.config import TeacherConfig
from si_distill.training.distillation.config import DistillConfig

ROOT = Path(__file__).parent.parent
DISTILL = ["--output_dir", "runs/s", "--teacher", "runs/t"]


def test_command_line_overrides_the_file_at_any_depth(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: a\nmax_steps: 7\ndata: {name: digits, max_train_samples: 50}\nmodel: {num_layers: 2}\n"
    )
    settings = parse_settings(
        TeacherConfig,
        ["--config", str(file), "--max_steps=9", "--data.max_train_samples", "20", "--model.num_layers", "4"],
    )
    assert (settings.output_dir, settings.max_steps, settings.data.max_train_samples) == ("a", 9, 20)
    assert settings.model == {"num_layers": 4}
    # A section given as a whole lies over the file's too.
    settings = parse_settings(TeacherConfig, ["--config", str(file), "--data", "{image_size: 8}"])
    assert settings.data.max_train_samples == 50


def test_numbers_that_yaml_reads_as_text_are_numbers(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: a\nlearning_rate: 1e-4\nadam_beta1: 0\n")
    arguments = [
        "--adam_epsilon",
        "1e-6",
        "--interpolant",
        "vp",
        "--interpolant_kwargs",
        "{b0: 2e-1}",
        "--t_min",
        "1e-3",
    ]
    settings = parse_settings(TeacherConfig, ["--config", str(file), *arguments])
    assert settings.learning_rate == 1e-4
    assert settings.adam_epsilon == 1e-6
    assert settings.interpolant_kwargs == {"b0": 0.2}
    assert isinstance(settings.adam_beta1, float)  # an integer beta is another code path in Adam


def test_no_is_a_word_and_false_is_a_boolean(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: a\nmixed_precision: no\noverwrite_output_dir: false\n")
    for argv in (["--config", str(file)], ["--output_dir", "a", "--mixed_precision", "no"]):
        settings = parse_settings(TeacherConfig, argv)
        assert (settings.mixed_precision, settings.overwrite_output_dir) == ("no", False)


@pytest.mark.parametrize(
    "text",
    ["W/exp #2", "010", "0o17", "1e3", "1.0", "no", "true", "null", "[a]", "{a: b}", "a: b", "'a'", "*x", "", " é "],
)
def test_text_is_never_parsed(text):
    argv = [
        f"--output_dir={text or 'runs/s'}",
        "--teacher=runs/t",
        "--data.split",
        text,
        "--data.reference_split=train",
    ]
    settings = parse_settings(DistillConfig, argv)
    assert (settings.output_dir, settings.data.split) == (text or "runs/s", text)
    assert parse_settings(EvaluationConfig, ["--pipeline", "p", "--output", text]).output == (
        None if text == "null" else text
    )


def test_text_in_a_file_is_taken_as_it_is_written(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: 010\nteacher: 1.0e2\ndata: {name: 12:30, split: yes, image_column: null}\nseed: 010\n")
    settings = parse_settings(DistillConfig, ["--config", str(file)])
    assert (settings.output_dir, settings.teacher, settings.data.name) == ("010", "1.0e2", "12:30")
    assert (settings.data.split, settings.data.image_column, settings.seed) == ("yes", None, 10)


def test_numbers_of_any_spelling_are_numbers():
    argv = ["--output_dir", "a", "--model.timestep_scale", "1.0e2", "--max_steps", "0o17", "--save_steps=1e3"]
    settings = parse_settings(TeacherConfig, [*argv, "--model.channel_mult", "1", "2e0", "--ema_extra", "[5e-1]"])
    assert settings.model == {"timestep_scale": 100.0, "channel_mult": [1, 2.0]}
    assert (settings.max_steps, settings.save_steps, settings.ema_extra) == (15, 1000, [0.5])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("output_dir: ~/x\n")
    settings = parse_settings(TeacherConfig, ["--config", "~/c.yaml", "--data.name=~/data"])
    assert (settings.output_dir, settings.data.name) == (f"{tmp_path}/x", f"{tmp_path}/data")


def test_a_key_that_appears_twice_in_a_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_text("output_dir: a\nmax_steps: 3\nmax_steps: 7\n")
    with pytest.raises(InputError, match=r"`max_steps` appears twice \(line 3"):
        parse_settings(TeacherConfig, ["--config", str(tmp_path / "c.yaml")])


def test_a_key_alone_is_a_flag_and_several_values_are_a_list():
    settings = parse_settings(TeacherConfig, ["--output_dir", "a", "--overwrite_output_dir", "--seed", "3"])
    assert settings.overwrite_output_dir is True
    assert settings.seed == 3
    assert parse_settings(EvaluationConfig, ["--pipeline", "p", "--teacher_steps", "1", "4"]).teacher_steps == [1, 4]
    assert parse_settings(EvaluationConfig, ["--pipeline", "p", "--teacher_steps", "8"]).teacher_steps == [8]


def test_another_objective_does_not_inherit_the_coefficients_of_the_file(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("output_dir: s\nteacher: t\nobjective: sid\nobjective_kwargs: {alpha: 1.2}\n")
    assert parse_settings(DistillConfig, ["--config", str(file)]).objective_kwargs == {"alpha": 1.2}
    changed = parse_settings(DistillConfig, ["--config", str(file), "--objective", "realuid"])
    assert changed.objective_kwargs == {}
    given = parse_settings(
        DistillConfig,
        ["--config", str(file), "--objective", "realuid", "--objective_kwargs", "{alpha: 0.98, beta: 0.96}"],
    )
    assert given.build_objective().critic == (0.98, 0.96, 0.98)


def test_settings_survive_a_round_trip_through_yaml():
    settings = parse_settings(DistillConfig, [*DISTILL, "--objective_kwargs", "{alpha: 1.2}", "--init_time", "0.7"])
    again = settings_from_dict(DistillConfig, yaml.safe_load(yaml.safe_dump(settings_to_dict(settings))))
    assert again == settings


@pytest.mark.parametrize(
    ("cls", "argv", "words"),
    [
        (DistillConfig, [*DISTILL, "--critic_step", "5"], ["critic_step`", "Did you mean `critic_steps`"]),
        (DistillConfig, [*DISTILL, "--batch_size", "8"], ["Did you mean `per_device_train_batch_size`?"]),
        (DistillConfig, [*DISTILL, "--data.nam", "x"], ["data.nam", "Did you mean `data.name`"]),
        (DistillConfig, [*DISTILL, "--critic_steps", "0"], ["critic_steps", "at least 1", "got 0"]),
        (DistillConfig, [*DISTILL, "--generator_steps", "0"], ["generator_steps", "at least 1"]),
        (DistillConfig, [*DISTILL, "--max_steps", "ten"], ["max_steps", "whole number", "ten"]),
        (DistillConfig, [*DISTILL, "--max_steps", "1.5"], ["max_steps", "whole number", "1.5"]),
        (DistillConfig, [*DISTILL, "--overwrite_output_dir", "maybe"], ["overwrite_output_dir", "true or false"]),
        (DistillConfig, [*DISTILL, "--objective", "sidd"], ["Unknown objective 'sidd'", "cross_term"]),
        (
            DistillConfig,
            [*DISTILL, "--objective_kwargs", "{alpah: 1}"],
            ["'sid' has no coefficient `alpah`"],
        ),
        (DistillConfig, [*DISTILL, "--objective_kwargs", "{space: pixels}"], ["Unknown space", "velocity, sample"]),
        (DistillConfig, [*DISTILL, "--objective_kwargs", "5"], ["objective_kwargs", "a mapping"]),
        (DistillConfig, [*DISTILL, "--init_time", "1.5"], ["init_time", "(0, 1]"]),
        (DistillConfig, [*DISTILL, "--t_min", "0.9", "--t_max", "0.5"], ["t_min < t_max", "[0.9, 0.5]"]),
        (DistillConfig, [*DISTILL, "--generator_t_min", "0.99"], ["generator_t_min", "[0.99, 0.98]"]),
        (
            DistillConfig,
            [*DISTILL, "--generator_time_sampler", "beta"],
            ["generator_time_sampler", "uniform, logit_normal"],
        ),
        (DistillConfig, [*DISTILL, "--learning_rate", "-1"], ["learning_rate", "positive"]),
        (DistillConfig, [*DISTILL, "--learning_rate", "nan"], ["learning_rate", "a number", "'nan'"]),
        (DistillConfig, [*DISTILL, "--guidance_scale", ".nan"], ["guidance_scale", "finite", "nan"]),
        (DistillConfig, [*DISTILL, "--time_mean", "-.inf"], ["time_mean", "finite", "-inf"]),
        (DistillConfig, [*DISTILL, "--time_mean", "1e39"], ["time_mean", "finite", "1e+39"]),
        (DistillConfig, [*DISTILL, "--objective_kwargs", "{alpha: .nan}"], ["objective_kwargs.alpha", "finite", "nan"]),
        (DistillConfig, [*DISTILL, "--class_frequencies", "1", ".inf"], ["class_frequencies", "finite", "inf"]),
        (DistillConfig, [*DISTILL, "--per_device_train_batch_size", "1e12"], ["at most 1,048,576", "1000000000000"]),
        (DistillConfig, [*DISTILL, "--dataloader_num_workers", "100000"], ["dataloader_num_workers", "at most 1,024"]),
        (DistillConfig, [*DISTILL, "--max_steps", "9" * 400], ["max_steps", "finite number of at most"]),
        (DistillConfig, [*DISTILL, "--max_steps", "9" * 9000], ["max_steps", "finite number of at most"]),
        (DistillConfig, [*DISTILL, "--seed", "4294967296"], ["seed", "at most 4,294,967,295"]),
        (EvaluationConfig, ["--pipeline", "p", "--seed", "4294967296"], ["seed", "at most 4,294,967,295"]),
        (DistillConfig, [*DISTILL, "--max_steps", "12:30"], ["max_steps", "a whole number", "'12:30'"]),
        (DistillConfig, [*DISTILL, "--max_steps", "1_000"], ["max_steps", "a whole number", "'1_000'"]),
        (DistillConfig, [*DISTILL, "--compile", "yes"], ["compile", "true or false", "'yes'"]),
        (
            DistillConfig,
            [*DISTILL, "--objective_kwargs", "{alpha: 1, alpha: 2}"],
            ["--objective_kwargs", "`alpha` appears"],
        ),
        (DistillConfig, [*DISTILL, "--data", "{name: &a b, split: *c}"], ["--data is not valid YAML", "alias"]),
        (DistillConfig, [*DISTILL, "--data.name", "a\0b"], ["data.name", "null character"]),
        (DistillConfig, [*DISTILL, "--data.name", "a\udcff"], ["data.name", "not UTF-8"]),
        (DistillConfig, [*DISTILL, "--config"], ["--config needs a file"]),
        (DistillConfig, ["--output_dir", "a", "b"], ["`output_dir` must be text, got ['a', 'b']"]),
        (DistillConfig, ["--output_dir", "--teacher", "b"], ["`output_dir` must be text, got True"]),
        (DistillConfig, [*DISTILL, "--ema_decay", "1"], ["ema_decay", "[0, 1)"]),
        (DistillConfig, [*DISTILL, "--mixed_precision", "fp16"], ["mixed_precision", "no, bf16"]),
        (DistillConfig, [*DISTILL, "--guidance_scale", "-1"], ["guidance_scale", "negative"]),
        (
            DistillConfig,
            [*DISTILL, "--guidance_t_min", "0.9", "--guidance_t_max", "0.2"],
            ["guidance_t_min", "[0.9, 0.2]"],
        ),
        (DistillConfig, [*DISTILL, "--critic_guidance_scale", "2"], ["null class", "critic_class_dropout_prob"]),
        (DistillConfig, [*DISTILL, "--adversarial.kind", "gan"], ["adversarial.kind", "none, encoder, head"]),
        (DistillConfig, [*DISTILL, "--adversarial.t_min", "0.1"], ["adversarial.t_max", "or neither"]),
        (DistillConfig, [*DISTILL, "--adversarial.kind", "head", "--adversarial.critic_weight", "-1"], ["negative"]),
        (DistillConfig, [*DISTILL, "--objective", "realuid", "--objective_kwargs", "{gamma: 1.5}"], ["0 < c <= 1"]),
        (DistillConfig, ["--output_dir", "runs/x", "--teacher", "runs/x"], ["same folder"]),
        (DistillConfig, ["--output_dir", "runs/x"], ["`teacher` is not set"]),
        (DistillConfig, ["--teacher", "runs/x"], ["`output_dir` is not set"]),
        (DistillConfig, ["runs/x"], ["--key value", "'runs/x'"]),
        (TeacherConfig, ["--output_dir", "a", "--interpolant", "linar"], ["'linar'", "linear, trigonometric, vp"]),
        (TeacherConfig, ["--output_dir", "a", "--interpolant", "vp"], ["infinite velocity at t = 0", "t_min"]),
        (
            TeacherConfig,
            ["--output_dir", "a", "--interpolant_kwargs", "{b0: 1}"],
            ["has no setting `b0`"],
        ),
        (TeacherConfig, ["--output_dir", "a", "--data", "digits"], ["`data` is a section"]),
        (TeacherConfig, ["--output_dir", "a", "--seed", "2", "--seed.deep", "1"], ["`seed` is a single value"]),
        (TeacherConfig, ["--config", "nowhere.yaml"], ["Cannot read the config file nowhere.yaml"]),
    ],
)
def test_mistakes_are_named_with_what_to_do(cls, argv, words):
    with pytest.raises(InputError) as caught:
        parse_settings(cls, argv)
    for word in words:
        assert word in str(caught.value)


def test_a_file_lies_over_the_files_that_it_includes(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/a.yaml").write_text(
        "output_dir: a\nteacher: t\nseed: 1\nobjective: sid\nobjective_kwargs: {alpha: 1.2}\n"
    )
    (tmp_path / "b.yaml").write_text("seed: 2\nmax_steps: 5\nobjective: gap\n")
    (tmp_path / "c.yaml").write_text("include: [deep/a.yaml, b.yaml]\nmax_steps: 6\n")
    settings = parse_settings(DistillConfig, ["--config", str(tmp_path / "c.yaml"), "--seed", "3"])
    assert (settings.output_dir, settings.seed, settings.max_steps) == ("a", 3, 6)
    # Coefficients belong to the objective that was chosen with them.
    assert (settings.objective, settings.objective_kwargs) == ("gap", {})

    (tmp_path / "b.yaml").write_text("include: [c.yaml]\n")
    with pytest.raises(InputError, match=r"includes c\.yaml, which includes it"):
        parse_settings(DistillConfig, ["--config", str(tmp_path / "c.yaml")])
    (tmp_path / "b.yaml").write_text("include: c.yaml\n")
    with pytest.raises(InputError, match=r"must be a list of files, got 'c\.yaml'"):
        parse_settings(DistillConfig, ["--config", str(tmp_path / "b.yaml")])
    (tmp_path / "b.yaml").write_text("include: [missing.yaml]\n")
    with pytest.raises(InputError, match=r"Cannot read the config file .*missing\.yaml"):
        parse_settings(DistillConfig, ["--config", str(tmp_path / "b.yaml")])


@pytest.mark.parametrize(
    ("cls", "name", "text"),
    [
        (EvaluationConfig, "features", "features: runpy:run_path"),
        (DistillConfig, "evaluation.features", "evaluation: {features: runpy:run_path}"),
    ],
)
def test_code_is_named_on_the_command_line_and_not_in_a_file(tmp_path, cls, name, text):
    (tmp_path / "c.yaml").write_text(text)
    argv = ["--config", str(tmp_path / "c.yaml"), *(["--pipeline", "runs/x"] if cls is EvaluationConfig else [])]
    argv += [] if cls is EvaluationConfig else ["--output_dir", str(tmp_path), "--teacher", "runs/x"]
    with pytest.raises(InputError, match=f"`{name}` in the config file.*add --{name} runpy:run_path"):
        parse_settings(cls, argv)
    parse_settings(cls, [*argv, f"--{name}", "runpy:run_path"])
    parse_settings(cls, [*argv, f"--{name}", "pixels"])


@pytest.mark.parametrize("text", ["- a\n- b\n", "output_dir: [\n", ""])
def test_a_config_file_that_is_no_mapping_is_refused(tmp_path, text):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match="config file"):
        parse_settings(TeacherConfig, ["--config", str(file)])


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_settings(DistillConfig, ["--help"], "what it does")
    assert stopped.value.code == 0
    printed = capsys.readouterr().out
    assert "what it does" in printed
    for name in ("--critic_steps", "--data.image_size", "--objective", "--resume_from_checkpoint"):
        assert name in printed


@pytest.mark.parametrize("path", sorted((ROOT / "configs/accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_accelerate_config_is_one_that_the_launcher_reads(path):
    config = load_config_from_file(str(path))  # refuses unknown keys
    assert config.num_processes == {"cpu": 1, "ddp": 8, "ddp_multinode": 16, "fsdp2": 8}[path.stem]
    assert config.use_cpu == (path.stem == "cpu")
    # The settings of a run decide: a launcher that says otherwise would change what config.yaml records.
    assert config.mixed_precision == "no"


def test_files_that_include_each_others_twice_do_not_double_for_ever(tmp_path):
    for number in range(40):
        name = f"i{number + 1}.yaml"
        (tmp_path / f"i{number}.yaml").write_text(f"include: [{name}, {name}]\n")
    (tmp_path / "i40.yaml").write_text("seed: 1\n")
    with pytest.raises(InputError, match="include each other 100 times"):
        parse_settings(TeacherConfig, ["--config", str(tmp_path / "i0.yaml")])


def test_an_error_does_not_write_to_the_terminal_what_a_name_holds(capsys):
    def fail(argv):
        raise InputError("The name \x1b]0;owned\x07 is wrong.\nTake another.")

    with pytest.raises(SystemExit):
        script_main(fail)
    assert "\x1b" not in (printed := capsys.readouterr().err)
    assert "The name \ufffd]0;owned\ufffd is wrong.\nTake another." in printed


@pytest.mark.parametrize("script", ["training/train_distill.py", "training/evaluate.py", "pipelines/publish.py"])
def test_help_whose_reader_has_gone_says_nothing_more(script):
    read, write = os.pipe()
    os.close(read)
    found = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (found.returncode, found.stderr) == (0, b"")


@pytest.mark.parametrize("script", sorted((ROOT / "training").glob("*.py")), ids=lambda path: path.stem)
def test_examples_in_the_help_keep_their_lines(script):
    found = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    command = ROOT / "src" / "si_distill" / "commands" / script.name
    written = command.read_text(encoding="utf-8").split('"""')[1]
    assert written in found.stdout


def test_an_error_of_one_process_alone_is_said(capsys, monkeypatch):
    def fail(argv):
        raise InputError("Its disk is full.")

    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        script_main(fail)
    assert "error (process 1): Its disk is full." in capsys.readouterr().err
