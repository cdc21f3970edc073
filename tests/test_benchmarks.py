"""The benchmarks run, write what they promise, and measure what they say."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

from si_distill.errors import InputError

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    with patch.dict(os.environ):  # the scripts set variables for their processes
        yield


def run(script: str, *arguments: object, check: bool = True, limit: int = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, f"benchmarks/{script}", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
    assert not check or done.returncode == 0, done.stderr
    return done


def table_rows(path: Path) -> dict[str, list[str]]:
    """First cell → the others, of a Markdown table."""
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0]: row[1:] for row in cells[2:]}


def test_sliced_wasserstein_of_a_shift_is_the_root_mean_square_of_its_projections():
    from mixture_points import sliced_wasserstein

    points = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    shuffled = points[torch.randperm(500, generator=torch.Generator().manual_seed(1))]
    shift = torch.tensor([3.0, -4.0])

    # A shift moves every projection by ⟨d, θ⟩, and E⟨d, θ⟩² = |d|² / D.
    found = sliced_wasserstein(points, shuffled + shift, projections=4096)
    assert found == pytest.approx(5 / math.sqrt(2), rel=0.02)
    # Twice the shift is twice the distance for the same directions, exactly.
    assert sliced_wasserstein(points, shuffled + 2 * shift, projections=4096) == pytest.approx(2 * found, rel=1e-6)
    assert sliced_wasserstein(points, shuffled) == pytest.approx(0, abs=1e-7)
    assert sliced_wasserstein(points, shuffled + shift) == sliced_wasserstein(shuffled + shift, points)


def test_sliced_wasserstein_of_a_scaling():
    from mixture_points import sliced_wasserstein

    points = torch.randn(2000, 1, generator=torch.Generator().manual_seed(0)).double()
    # In one dimension W₂ between x and 3x is |3 − 1| times the root mean square of x.
    assert sliced_wasserstein(points, 3 * points) == pytest.approx(2 * points.square().mean().sqrt().item(), rel=1e-9)
    with pytest.raises(ValueError, match="same shape"):
        sliced_wasserstein(points, points[:-1])


@pytest.mark.parametrize("target", ["gaussians", "moons"])
def test_targets_have_about_zero_mean_and_unit_variance(target):
    from mixture_points import TARGETS

    points = TARGETS[target](20000, torch.Generator().manual_seed(0))
    assert points.mean(0).abs().max() < 0.05
    assert points.var(0).sub(1).abs().max() < 0.1


def test_mixture_compares_every_preset(tmp_path):
    from mixture_2d import presets

    run("mixture_2d.py", "--quick", "--workers", 1, "--targets", "moons", "--output", tmp_path, "--figures", tmp_path)

    rows = table_rows(tmp_path / "mixture_2d.md")
    assert list(rows) == ["data against data", "teacher, 50 steps", *presets()]
    assert all(math.isfinite(float(value)) for row in rows.values() for value in row)
    result = json.loads((tmp_path / "mixture_2d.json").read_text(encoding="utf-8"))
    assert all(math.isfinite(gap) and gap > 0 for student in result["students"] for gap in student["gap"])
    assert (tmp_path / "mixture_2d_moons.png").stat().st_size > 10_000


def test_digits_sweep_measures_resumes_and_refuses_another_budget(tmp_path, teacher_folder, capsys):
    from digits_sweep import main

    runs = tmp_path / "runs.yaml"
    runs.write_text("gap: {objective: gap}\nreal: {objective: realuid, objective_kwargs: {alpha: 0.9, beta: 0.95}}\n")
    sizes = "--steps 4 --points 2 --num_samples 64 --teacher_steps 1".split()
    folders = ["--runs", runs, "--teacher", teacher_folder, "--output", tmp_path, "--figures", tmp_path]
    sweep = [*map(str, folders), *sizes]

    run("digits_sweep.py", *sweep, "--workers", 1, "--seeds", 0, 1, "--only", "gap")
    rows = table_rows(tmp_path / "digits_sweep.md")
    assert list(rows) == ["teacher, 1 step", "gap"]
    (seeds, *cells) = rows["gap"]
    assert seeds == "2"
    assert all(math.isfinite(float(value)) for found in cells for value in found.split(" ± "))
    assert (tmp_path / "digits_sweep.png").stat().st_size > 10_000
    found = json.loads((tmp_path / "digits_sweep.json").read_text(encoding="utf-8"))["runs"]
    assert [[point["updates"] for point in one["curve"]] for one in found] == [[0, 2, 4], [0, 2, 4]]

    main([*sweep, "--seeds", "0", "1", "--only", "gap"])
    assert "0 runs to make, 2 are there" in capsys.readouterr().err
    with pytest.raises(InputError, match="other settings"):
        main([*sweep, "--num_samples", "32"])
    # An entry that has changed since is another run: its old results leave the table.
    runs.write_text("gap: {objective: gap, critic_steps: 2}\n")
    main([*sweep, "--seeds", "[]"])
    assert list(table_rows(tmp_path / "digits_sweep.md")) == ["teacher, 1 step"]


def test_gradients_of_the_cross_term_add_up(teacher_folder):
    from cross_term_gradient import GradientConfig, compare

    config = GradientConfig(teacher=str(teacher_folder), updates=1, settling=2, batches=1)
    rows = {(row["critic"], row["loss"]): row for row in compare("gap", config)}

    assert rows["settled", "gap"]["cosine"] == pytest.approx(1, abs=1e-5)
    for critic in ("live", "settled"):
        gap, cross, rest = (rows[critic, name] for name in ("gap", "cross_term", "‖v_ψ‖² − ‖v*‖²"))
        assert all(row["norm"] > 0 and abs(row["cosine"]) < 1 + 1e-5 for row in (gap, cross, rest))
        # Projections on one direction add up as the losses do.
        along = [row["norm"] * row["cosine"] for row in (gap, rest, cross)]
        assert along[0] + along[1] == pytest.approx(along[2], rel=1e-4, abs=1e-5)


def test_every_run_of_the_sweep_is_valid():
    import yaml
    from digits_sweep import SweepConfig

    from si_distill.training.comparison.run import run_arguments, run_settings

    config = SweepConfig(base=str(ROOT / "benchmarks/digits_base.yaml"))
    entries = yaml.safe_load((ROOT / "benchmarks/digits_sweep.yaml").read_text(encoding="utf-8"))
    settings = [run_settings(run_arguments(config, changes, seed=2), 100) for changes in entries.values()]
    assert len({repr(s) for s in settings}) == len(entries)  # no two runs are the same
    assert all(s.seed == 2 and s.max_steps * s.generator_steps == 100 for s in settings)


@pytest.fixture
def exact_game():
    from gaussian_oracle import TIMES
    from realuid_curves import ExactGame

    return ExactGame(torch.linspace(-10, 10, 401, dtype=torch.float64), TIMES)


def test_exact_game_of_gaussians_is_the_oracles_distance_without_data_and_zero_at_the_data_with_it(exact_game):
    from gaussian_oracle import Game, Gaussian
    from realuid_curves import Mixture, realuid

    from si_distill import get_interpolant, get_objective

    data, student = Mixture.of([1.0], [0.2], [0.8]), Mixture.of([1.0], [-0.4], [1.3])
    oracle = Game(get_interpolant("linear"), get_objective("gap"), Gaussian(data.means, data.stds))
    expected = oracle.distance(Gaussian(student.means, student.stds))
    assert exact_game.value(get_objective("gap"), student, data, data).item() == pytest.approx(
        expected.item(), rel=1e-9
    )
    for coefficients in [(0.92, 0.94), (0.5, 1.0, 1.0)]:
        assert exact_game.value(realuid(*coefficients), data, data, data).abs() < 1e-12
        assert exact_game.value(realuid(*coefficients), student, data, data) > 0.1


def test_with_alpha_equal_to_beta_the_student_adds_to_the_teachers_error(exact_game):
    # (α p_g + (1−α) p_d) has the teacher's velocity field exactly when it is the teacher's law.
    from realuid_curves import DATA, TEACHERS, realuid

    teacher, alpha = TEACHERS["wrong shares"], 0.9
    student = exact_game.best_student(realuid(alpha, alpha), DATA, teacher)
    expected = DATA.weights + (teacher.weights - DATA.weights) / alpha
    torch.testing.assert_close(student.weights, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(student.means, teacher.means, rtol=0, atol=1e-3)


def test_realuid_curves_are_drawn(tmp_path):
    from realuid_curves import SHOWN, TEACHERS, name

    run(
        "realuid_curves.py", *"--points 81 --times 5 --curve_points 5 --output".split(), tmp_path, "--figures", tmp_path
    )

    rows = table_rows(tmp_path / "realuid_curves.md")
    assert list(rows) == ["the teacher itself", *map(name, SHOWN)]
    assert all(len(row) == len(TEACHERS) for row in rows.values())
    assert rows["α = 1, β = 1"] == rows["the teacher itself"]  # without data the student is its teacher
    for picture in ("realuid_loss_curves.png", "realuid_corrupted_teacher.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_solver_errors_rank_the_solvers(monkeypatch, capsys):
    import solver_errors

    monkeypatch.setattr(solver_errors, "EVALUATIONS", (15, 31))
    solver_errors.main()
    lines = capsys.readouterr().out.splitlines()
    solvers = [cell.strip(" `") for cell in lines[0].strip("|").split("|")][2:]
    numbers = [line for line in lines if line[-2:] == " |" and line.rstrip(" |")[-1].isdigit()]
    rows = [[float(cell) for cell in line.strip("|").split("|")[1:]] for line in numbers]
    assert len(rows) == 10 + 6
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        assert all(b < a for a, b in zip(few[1:], many[1:], strict=True))  # errors fall with evaluations
    edm = dict(zip(solvers, rows[9][1:], strict=True))
    assert edm["dpmpp_2m"] < edm["edm_heun"] < edm["ddim"] < edm["euler"]


TINY = "{num_layers: 1, num_attention_heads: 2, attention_head_dim: 8, num_classes: 10}"


def test_iterations_are_timed_in_turns_and_ours_computes_less(tmp_path):
    arguments = ["--model", TINY, "--rounds", 2, "--warm_up", 1, "--threads", 1, "--matrix", 64]
    printed = run("iteration.py", *arguments, "--rows", "{gap: --objective gap}", "--profile", "--output", tmp_path)
    assert printed.stdout.count("aten::mm ") >= 4  # in the profile of each row

    rows = table_rows(tmp_path / "iteration_cpu_sit-s-2.md")
    products = ["matrix product, fp32", "matrix product, bf16"]
    assert list(rows) == ["baseline, fp32", "ours, fp32", "ours, bf16", "ours, fp32, gap", *products]
    result = json.loads((tmp_path / "iteration_cpu_sit-s-2.json").read_text(encoding="utf-8"))
    found = {row["name"]: row for row in result["rows"]}
    assert all(len(row["seconds"]) == 2 and min(row["seconds"]) > 0 for row in result["rows"])
    # In forwards of a batch, a backward counting as two: 5 (2 + 3) + 2·3 + 2 of the seed; 5·3 + 3 + 3 of ours, whose
    # backward spares the gradient of the first layer's input.
    counted = found["baseline, fp32"]["flops"] / found["ours, fp32"]["flops"]
    assert counted == pytest.approx(33 / 21, rel=0.04)
    assert found["ours, fp32, gap"]["flops"] > found["ours, fp32"]["flops"]
    assert found["matrix product, bf16"]["flops"] == 2 * 64**3


def test_a_peer_that_is_none_is_refused(tmp_path):
    from iteration import main

    with pytest.raises(InputError, match="is no checkout of WladGrm/si-adistill"):
        main(["--peer", str(tmp_path)])


def test_the_seeds_schedule_calls_its_networks_as_often_as_its_loop_does():
    from helpers import tiny_sit
    from iteration_loops import seed_schedule

    teacher, calls = tiny_sit(), []
    # Copies of the network keep the hook; rows of each call, and whether the network then learns.
    teacher.register_forward_hook(lambda net, args, output: calls.append((len(args[0]), output[0].requires_grad)))
    seed_schedule(teacher, range(2), batch=3)
    critic_update, generator_update = [(6, False), (3, True)], [(6, True), (3, False), (3, False)]
    assert calls == 2 * (5 * critic_update + generator_update)


def test_data_rates_are_of_both_in_one_run(tmp_path):
    import data_rate

    few = "--made 12 --images 24 --rounds 2 --workers 1 --batch_size 8 --image_size 256".split()
    data_rate.main([*few, "--output", str(tmp_path)])
    rows = table_rows(tmp_path / "data_rate.md")
    assert list(rows) == ["decode and crop alone", "streamed batches", "streamed / alone"]
    alone, streamed, ratio = json.loads((tmp_path / "data_rate.json").read_text())["measured"].values()
    for kind in ("rate", "cost"):
        assert ratio[kind] == [s / a for s, a in zip(streamed[kind], alone[kind], strict=True)]
        assert len(alone[kind]) == 2
        assert min(alone[kind] + streamed[kind]) > 0


def test_the_page_on_scaling_is_what_its_command_prints(capsys):
    from scaling import SIZES, forward_operations, main, network_of

    main([])
    page = (ROOT / "docs/scaling.md").read_text(encoding="utf-8")
    for section in capsys.readouterr().out.strip().split("\n\n"):
        assert section in page
    # DiT's published multiply-adds of XL/2 (Peebles & Xie 2023, table 1) are half of the operations.
    assert forward_operations(network_of(SIZES[-1])) == pytest.approx(2 * 118.6e9, rel=0.01)


def test_rings_send_what_their_operations_need():
    from si_distill import get_objective
    from si_distill.training.distillation.config import DistillConfig
    from si_distill.training.dry_run.communication import transfers
    from si_distill.training.dry_run.memory import Devices

    def sent(name, devices, **values):
        settings = DistillConfig(output_dir="run", teacher="teacher", critic_steps=2, generator_steps=3, **values)
        found = transfers(1000, get_objective(name), settings, devices)
        return sum(transfer.sent(devices.count) for transfer in found)

    assert sent("gap", Devices()) == 0
    assert sent("gap", Devices(4)) == pytest.approx(2 * 3 / 4 * 4000 * (2 + 3))
    # Detached: critic 2 · 2 + 3 gathers, student 2 · 3, teacher 3; 2 + 3 sums of gradients.
    cut = Devices(4, sharded=True)
    assert sent("cross_term_detached", cut) == pytest.approx(3 / 4 * (4000 * (7 + 6 + 3) + 4000 * 5))
    assert sent("cross_term_detached", cut, mixed_precision="bf16") == pytest.approx(3 / 4 * (2000 * 16 + 4000 * 5))
    assert sent("gap", cut) == pytest.approx(3 / 4 * (4000 * (10 + 6 + 6) + 4000 * 5))


def test_the_pipelines_overhead_is_what_is_outside_the_network(tmp_path, capsys):
    from generation_overhead import main

    threads = torch.get_num_threads()
    pixels = TINY.replace("}", ", in_channels: 3}")
    main(["--model", pixels, "--batch", "3", "--rounds", "2", "--threads", str(threads), "--output", str(tmp_path)])
    rows = table_rows(tmp_path / "generation_overhead_cpu.md")
    assert list(rows) == ["bare forward", 'pipeline, output_type="latent"', 'pipeline, output_type="pt"']
    found = json.loads((tmp_path / "generation_overhead_cpu.json").read_text(encoding="utf-8"))["seconds"]
    assert all(0 < outside < whole for times in found.values() for whole, outside in times)


def test_superres_compares_every_method_on_inputs_that_no_training_saw(tmp_path):
    arguments = ["--seeds", 1, "--max_steps", 2, "--split", "train[1740:]", "--teacher_steps", 2, "--workers", 1]
    folders = ["--runs", tmp_path / "runs", "--output", tmp_path, "--figures", tmp_path]
    run("digits_superres.py", *arguments, *folders)
    rows = table_rows(tmp_path / "digits_superres.md")
    assert list(rows) == ["bicubic", "regression", "teacher, 2 steps", "student, 1 step"]
    result = json.loads((tmp_path / "digits_superres.json").read_text())
    regression, bicubic = (result["results"][0]["rows"][name] for name in ("regression", "bicubic"))
    assert regression["diversity"] == bicubic["diversity"] == 0
    assert result["results"][0]["rows"]["student, 1 step"]["diversity"] > 0
    assert bicubic["PSNR"] > regression["PSNR"]  # of two updates
    assert (tmp_path / "digits_superres.png").exists()
    config = (tmp_path / "runs" / "seed1" / "student" / "config.yaml").read_text()
    assert "train[:1297]" in config


def test_paired_differences(tmp_path):
    """Against the numbers by hand: differences −1, 0 and −2 from the best of each teacher's rows."""

    def evaluation(name, student, teachers, **changed):
        rows = [("student, 1 step", "student", student), *((f"teacher, {n}", "teacher", n) for n in teachers)]
        rows = [
            {"generator": label, "made": {"kind": kind}, "Fréchet distance": value, "label accuracy": 0.9}
            for label, kind, value in rows
        ]
        values = dict(evaluator="e", features={}, num_samples=9, reference={"probe": "p"}, distance="Fréchet distance")
        (tmp_path / name).write_text(json.dumps({**values, "rows": rows, **changed}))
        return tmp_path / name

    files = [evaluation("a", 2.0, [5.0, 3.0]), evaluation("b", 4.0, [4.0]), evaluation("c", 1.0, [3.0, 8.0])]
    printed = run("paired_differences.py", *files).stdout
    row = next(line for line in printed.splitlines() if line.startswith("| student"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["3", "2.000 4.000 1.000", "3.000 4.000 3.000"]
    assert cells[4:] == ["-1.000 [-3.484, +1.484]", "2", "+0.000 [+0.000, +0.000]"]  # 1 ± 4.303 · 1/√3
    assert "teacher, 3.0; teacher, 4.0" in printed
    for wrong, words in (
        (evaluation("d", 1.0, []), "has no row of a teacher"),
        (evaluation("e", 1.0, [2.0], num_samples=8), "was measured in another way"),
        (tmp_path / "missing", "is not an evaluation"),
    ):
        done = run("paired_differences.py", files[0], wrong, check=False)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


SHORT_TEACHER = ["--max_steps", 30, "--eval_steps", 30, "--save_steps", 30, "--output_dir"]


def test_time_to_quality(tmp_path):
    """The rate that ends nearest is taken, what is not reached is a bound, and a finished run is not made again."""
    (tmp_path / "recipes.yaml").write_text("ours: {}\nslower: {critic_steps: 3, critic_draws: fresh}\n")
    run("../training/train_teacher.py", "--config", "configs/digits/teacher.yaml", *SHORT_TEACHER, tmp_path / "teacher")
    arguments = [
        "--teacher",
        tmp_path / "teacher",
        "--runs",
        tmp_path / "recipes.yaml",
        "--seeds",
        3,
        "--num_samples",
        60,
    ]
    arguments += ["--steps", 4, "--points", 2, "--rates", 1e-9, 1e-2, "--output", tmp_path, "--figures", tmp_path]
    run("time_to_quality.py", *arguments)
    rows = table_rows(tmp_path / "time_to_quality.md")
    found = json.loads((tmp_path / "time_to_quality.json").read_text())
    runs = {(one["name"], one["seed"]): one["curve"] for one in found["runs"]}
    target = found["teacher"][0]["distance"]
    for name, images, forwards in (("ours", 1, 4), ("slower", 4, 9)):
        tried = {rate: runs[f"{name}, {rate:g}", 100][-1] for rate in (1e-9, 1e-2)}
        rate = min(tried, key=lambda rate: (tried[rate]["distance"] >= target, tried[rate]["distance"]))
        last = runs[f"{name}, {rate:g}", 3][-1]
        arrived = last["distance"] < target
        assert arrived or last["updates"] == 4
        sign = "" if arrived else "> "
        assert rows[name][:2] == [f"{rate:g}", f"{arrived:d} of 1"]
        # Of an update with a batch of 64: the student's images, and who sees them.
        counts = [last["updates"] * per_update for per_update in (1, images * 64, forwards * 64)]
        assert rows[name][3:6] == [f"{sign}{count:,}" for count in counts]
    assert len(runs) == 6
    assert (tmp_path / "time_to_quality.png").exists()
    again = run("time_to_quality.py", *arguments)  # nothing is missing
    assert json.loads((tmp_path / "time_to_quality.json").read_text()) == found
    assert "| slower |" in again.stdout


def test_on_gpu_runs_whole_on_a_cpu(tmp_path):
    run("on_gpu.py", "--small", "--seconds", 500, "--batch", 4, "--output", tmp_path, limit=1200)
    page = (tmp_path / "on_gpu.md").read_text(encoding="utf-8")
    titles = [line for line in page.splitlines() if line.startswith("## ")]
    assert titles == ["## Agreement", "## Iteration, sit-s/2", "## Memory", "## Pipeline", "## Sharding"]
    assert "Failed" not in page
    assert "Stopped" not in page
    # Two processes on one CPU do the same.
    assert [line.split("|")[3].strip() for line in page.splitlines() if line.startswith("| student")] == ["0.0e+00"] * 5
