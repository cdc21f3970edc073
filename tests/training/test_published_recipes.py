"""Every published recipe under configs/, as our parser resolves it, against the values of the published code.

The values are typed from the public repositories (file and line next to each), at these commits: SiD `01fbb13`, SiDA
`a5510fd` (SiD's branch `sida`), RealUID `b61c1c3`, DMD2 `8d8fa55`, FastGen `34f30e8`, si-adistill `0c0cd19`. A default of
ours that changes fails a test here instead of a paper.
"""

import re
from dataclasses import asdict

import pytest
import yaml
from script_runs import ROOT

from si_distill.settings import parse_settings
from si_distill.training.distillation.config import DistillConfig

CONFIGS = ROOT / "configs"
RECIPES = sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))
STUDENTS = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.glob("*/distill*.yaml"))


def read(*names: str) -> DistillConfig:
    return parse_settings(DistillConfig, [word for name in names for word in ("--config", f"{CONFIGS}/{name}.yaml")])


def resolved(settings: DistillConfig, processes: int) -> dict:
    """What decides the updates of a run, in published terms."""
    objective, critic, gan = settings.build_objective(), settings.of_critic(), settings.adversarial
    of_student = {name: getattr(settings, name) for name in critic}
    optimizer = "learning_rate adam_beta1 adam_beta2 adam_epsilon weight_decay".split()
    batch = settings.per_device_train_batch_size * settings.gradient_accumulation_steps * processes
    main = settings.ema_decay if settings.ema_halflife_images is None else settings.ema_halflife_images
    found = {
        "objective": (settings.objective, objective.critic, objective.generator, objective.detach, objective.space),
        "student loss": (objective.weight, settings.loss_reduction, settings.loss_scale),
        "critic loss": (objective.critic_weight, critic["loss_reduction"]),
        "updates": (settings.critic_steps, settings.generator_steps, settings.critic_draws, settings.generator_first),
        "starts": (settings.critic_start if settings.critic_start != settings.student else "the student's run",),
        "student optimizer": tuple(of_student[name] for name in optimizer),
        "critic optimizer": tuple(critic[name] for name in optimizer),
        "warm-up": (of_student["lr_warmup_steps"], critic["lr_warmup_steps"], settings.lr_scheduler_type),
        "clipping": (of_student["max_grad_norm"], critic["max_grad_norm"], gan.max_grad_value),
        "dropout": (settings.dropout, settings.critic_dropout),
        "batch": batch,
        "images": round(settings.max_steps * batch, -6 if batch > 64 else 0),
        "average": (main, settings.ema_rampup_ratio if main >= 1 else settings.ema_warmup and main > 0),
        "critic times": (settings.time_sampler, settings.t_min, settings.t_max, settings.time_steps),
        "student times": (
            settings.generator_time_sampler or settings.time_sampler,
            *(round(t, 6) for t in settings.generator_times),
        ),
        "lognormal": (settings.time_mean, settings.time_std),
        "classes": settings.label_sampling,
        "augmentation": (settings.augment_prob, settings.data.random_flip),
        "start time": settings.init_time,
        "edm2": (settings.critic_log_variance, settings.forced_weight_normalization),
        "frozen": (settings.generator_start_images, gan.start_images),
        "gan": None,
    }
    if gan.kind != "none":
        found["gan"] = (gan.kind, gan.critic_weight, gan.generator_weight, gan.combine, gan.clamp)
        found["gan head"] = (gan.head, gan.features) if gan.kind == "head" else None
        found["gan draws"] = (gan.t_min, gan.t_max, gan.own_noise, gan.real_apart, gan.shared_augmentation)
    return found


# The published values. NONE is a clipping that never acts.
NONE = 1.0e9
SID_OBJECTIVE = lambda alpha, name="sid": (name, (1, 1, 1), (1, 1, 2 * alpha), False, "sample")  # noqa: E731

SID = {  # sid_train.py, training/sid_loss.py, training/sid_training_loop.py
    "objective": SID_OBJECTIVE(1.2),  # run_sid.sh:26; sid_loss.py:61
    "student loss": ("sid", "sum", 50.0),  # sid_loss.py:59-61, half of ours; lsg 100, run_sid.sh:43, loop:332
    "critic loss": ("edm", "sum"),  # sid_loss.py:67, 78; loop:306
    "updates": (1, 1, "fresh", False),  # loop:298 and 324, each with its own z and batch
    "starts": ("teacher",),  # loop:232-233
    "student optimizer": (1e-5, 0.0, 0.999, 1e-8, 0.0),  # run_sid.sh:40; sid_train.py:153
    "critic optimizer": (1e-5, 0.0, 0.999, 1e-8, 0.0),  # run_sid.sh:39; sid_train.py:152
    "warm-up": (0, 0, "constant"),
    "clipping": (NONE, NONE, None),  # loop:313-317 only replaces values that are not finite
    "dropout": (0.13, 0.13),  # sid_train.py:71, in the pickle's network and its copies
    "batch": 256,  # run_sid.sh:29
    "images": 500_000_000,  # run_sid.sh:44
    "average": (500_000, 0.05),  # sid_train.py:70; loop:131
    "critic times": ("lognormal", 1e-4, 1.0, None),  # sid_loss.py:66
    "student times": ("karras", 1e-4, 0.8),  # tmax 800, run_sid.sh:27; sid_loss.py:34
    "lognormal": (-1.2, 1.2),  # sid_loss.py:20
    "classes": None,
    "augmentation": (0.12, False),  # sid_train.py:72, 73
    "start time": None,  # init_sigma 2.5, run_sid.sh:28: our default on this path (test_configs dry-runs it)
    "edm2": (False, True),
    "frozen": (0, 0),
    "gan": None,
}
SIDA = {  # branch sida: sida_train.py, sida_training/sida_loss.py, sida_training/sida_training_loop.py
    **SID,
    "objective": SID_OBJECTIVE(1.0, "sida"),  # run_sida.sh, --alpha 1 everywhere
    "clipping": (NONE, NONE, 1.0),  # sida_training_loop.py:381
    "images": 300_000_000,  # run_sida.sh, cifar10-uncond: --duration 300
    "frozen": (100_000, 200_000),  # sida_training_loop.py:425 and 410
    "gan": ("encoder", 1.0, 0.01, "mean", 10.0),  # --lsd 1, --lsg_gan 0.01; loop:411; sida_loss.py:76
    "gan head": None,
    "gan draws": (None, None, False, False, False),  # sida_loss.py:94-108: n and sigma shared, augmentations apart
}
FP16 = lambda lr, beta1=0.0: (lr, beta1, 0.999, 1e-6, 0.0)  # noqa: E731 - eps, sid_train.py:152-153
IMAGENET64 = {
    "student optimizer": FP16(4e-6),  # run_sid.sh:90, 91
    "critic optimizer": FP16(4e-6),  # run_sid.sh:89
    "dropout": (0.1, 0.1),  # run_sid.sh:94
    "augmentation": (0.0, False),  # run_sid.sh:95
    "average": (2_000_000, 0.05),  # run_sid.sh:96
    "batch": 8192,  # run_sid.sh:79
}
FFHQ = {
    "critic optimizer": FP16(1e-5),  # run_sid.sh:115, 117
    "dropout": (0.05, 0.05),  # run_sid.sh:120
    "augmentation": (0.15, False),  # run_sid.sh:121
    "batch": 512,  # run_sid.sh:105
}
AFHQ = {
    "student optimizer": FP16(5e-6),  # run_sid.sh:143, 144
    "critic optimizer": FP16(5e-6),  # run_sid.sh:142
    "dropout": (0.05, 0.05),  # run_sid.sh:147
    "augmentation": (0.15, False),  # run_sid.sh:148
    "batch": 512,  # run_sid.sh:132
}
SID_EDM2 = {  # branch sida: run_sid_edm2.sh, sida_edm2_train.py, sida_training_edm2/
    **SID,
    "objective": SID_OBJECTIVE(1.0),  # --alpha 1
    "student optimizer": FP16(5e-5),  # --glr 5e-5, --fp16 1; sida_edm2_train.py:200
    "critic optimizer": FP16(5e-5),
    "dropout": (0.1, 0.1),  # sida_edm2_train.py:236, 240 and so on
    "batch": 2048,
    "images": 200_000_000,
    "average": (2_000_000, 0.05),  # --ema 2
    "lognormal": (-0.4, 1.0),  # sida_edm2_train.py:223-260
    "classes": "empirical",  # sida_training_loop_edm2.py:643, 697
    "augmentation": (0.0, False),
    "edm2": (True, True),  # --return_logvar 1, --force_normalization 1
}
SIDA_EDM2 = {
    **SIDA,
    **{name: SID_EDM2[name] for name in SID_EDM2 if SID_EDM2[name] != SID[name]},
    "objective": SID_OBJECTIVE(1.0, "sida"),
    "classes": None,  # those of the images in the batch
    "clipping": (NONE, NONE, None),  # sida_training_loop_edm2.py:685-686, commented out
    "gan": ("encoder", 100.0, 0.01, "mean", 10.0),  # run_sida_edm2.sh: --lsd 100
}
REALUID = {  # run.sh, train_distil.py, src/losses.py
    "objective": ("realuid", (0.92, 0.94, 0.92), (0.92, 0.94, 0.92), False, "velocity"),  # run.sh:76-77
    "student loss": ("uniform", "sum", 1.0),  # losses.py:29-31
    "critic loss": ("uniform", "sum"),  # losses.py:19-25
    "updates": (5, 1, "fresh", False),  # train_distil.py:39, 343-358
    "starts": ("random",),  # train_distil.py:255, before line 263
    "student optimizer": (3e-5, 0.0, 0.999, 1e-8, 0.0),  # run.sh:79; train_distil.py:286
    "critic optimizer": (3e-5, 0.0, 0.999, 1e-8, 0.0),  # train_distil.py:287
    "warm-up": (500, 500, "constant"),  # train_distil.py:82, 290-293
    "clipping": (1.0, 1.0, None),  # train_distil.py:86, 380, 412
    "dropout": (None, None),  # train_distil.py:87: 0.0, and the network has none
    "batch": 256,  # run.sh:78
    "images": round(800_000 / 6 * 256, -6),  # train_distil.py:80: every sixth step is the generator's
    "average": (0.9999, False),  # src/train_utils.py, ema(): constant from the first update
    "critic times": ("uniform", 0.0, 1.0, None),  # train_distil.py:352
    "student times": ("uniform", 0.0, 1.0),
    "lognormal": (0.0, 1.0),  # not used
    "classes": None,
    "augmentation": (0.0, True),  # train_distil.py, RandomHorizontalFlip
    "start time": 1.0,  # src/generate.py, gen_function
    "edm2": (False, True),
    "frozen": (0, 0),
    "gan": None,
}
REALUID_GAN = {
    "objective": ("realuid", (1.0, 1.0, 1.0), (1.0, 1.0, 1.0), False, "velocity"),  # run.sh:145-146
    "gan": ("head", 1.0, 0.3, "sum", None),  # run.sh:148-149
    "gan head": ("realuid", "critic"),  # src/models.py:52-60
    "gan draws": (
        0.0,
        0.2,
        False,
        False,
        True,
    ),  # train_distil.py:355 in reversed time; losses.py, GANloss: x0 and t shared
}
DMD2 = {  # main/edm/train_edm.py, main/edm/edm_guidance.py, experiments/imagenet/
    "objective": ("dmd2", (1, 1, 1), (0, 1, 0), True, "sample"),  # edm_guidance.py, compute_distribution_matching_loss
    "student loss": ("sid", "mean", 0.5),  # the same: 0.5 * mse, weight 1 / mean|p_real|
    "critic loss": ("edm", "mean"),  # compute_loss_fake
    "updates": (5, 1, "fresh", True),  # dfake_gen_update_ratio 5; train_edm.py:235-263
    "starts": ("teacher",),
    "student optimizer": (2e-6, 0.9, 0.999, 1e-8, 0.01),  # train_edm.py:104-109
    "critic optimizer": (2e-6, 0.9, 0.999, 1e-8, 0.01),  # train_edm.py:97-102
    "warm-up": (15, 72, "constant"),  # train_edm.py:469: 500 scheduler steps, 7 of them in each step
    "clipping": (10.0, 10.0, None),  # train_edm.py:485, 257, 285
    "dropout": (0.0, 0.0),  # edm_network.py:11
    "batch": 280,  # --batch_size 40 on 7 processes
    "images": round(200_000 / 5 * 280, -6),  # README of experiments/imagenet: 200k
    "average": (0.0, False),  # there is none
    "critic times": ("uniform", 0.0, 1.0, 1000),  # compute_loss_fake: randint(0, 1000)
    "student times": ("uniform", round(20 / 999, 6), round(980 / 999, 6)),  # train_edm.py:470-471
    "lognormal": (0.0, 1.0),  # not used
    "classes": "uniform",  # train_edm.py:228
    "augmentation": (0.0, False),
    "start time": 1.0,  # conditioning_sigma 80, train_edm.py:475
    "edm2": (False, True),
    "frozen": (0, 0),
    "gan": ("head", 0.01, 0.003, "sum", None),  # --cls_loss_weight 1e-2 --gen_cls_loss_weight 3e-3
    "gan head": ("dmd2", "critic"),  # edm_guidance.py, cls_pred_branch
    "gan draws": (0.0, 1.0, True, True, True),  # compute_cls_logits draws for each call
}
FASTGEN = {  # fastgen/configs/experiments/EDM/config_dmd2_in64.py and what it builds on
    **DMD2,
    "critic loss": ("sample", "mean"),  # common_loss.py, denoising_score_matching_loss of "x0"
    "updates": (4, 1, "fresh", False),  # config_dmd2.py, student_update_freq 5
    "warm-up": (0, 0, "constant"),  # config_dmd2.py, warm_up_steps [0]
    "clipping": (10.0, NONE, None),  # callbacks.py, GradClip_CALLBACK: model_key "net"
    "batch": 512,
    "images": round(600_000 / 5 * 512, -6),
    "average": (0.9995001, False),  # callbacks.py, EMA_CONST_CALLBACKS: 0.9999 in each of five steps
    "critic times": ("uniform", 0.002002002, 0.998998999, 1000),  # noise_schedule.py:744-745, 931, the student's too
    "student times": ("uniform", 0.002002, 0.998999),
    "classes": None,  # those of the images
    "gan": ("head", 1.0, 0.003, "sum", None),  # dmd2.py:386; config_dmd2_in64.py
    "gan head": ("dmd2", "teacher"),  # dmd2.py:360-377; configs/discriminator.py
    "gan draws": (None, None, False, True, True),  # config_dmd2.py, gan_use_same_t_noise False
}
SI_ADISTILL = {  # SiT/distill_ddp.py, SiT/transport/transport.py
    "objective": ("cross_term_detached", (1, 1, 1), (0, 1, 0), True, "velocity"),  # transport.py, distillation_loss
    "student loss": ("uniform", "sum", 1.0),
    "critic loss": ("uniform", "mean"),  # transport.py, training_losses: mean_flat
    "updates": (5, 1, "shared", False),  # distill_ddp.py:57-59, 118-121
    "starts": ("teacher",),
    "student optimizer": (1e-5, 0.9, 0.999, 1e-8, 0.0),  # distill_ddp.py:52, 107
    "critic optimizer": (1e-5, 0.9, 0.999, 1e-8, 0.0),  # distill_ddp.py:106
    "warm-up": (0, 0, "constant"),
    "clipping": (NONE, NONE, None),
    "dropout": (None, None),  # SiT has none but of labels
    "batch": 128,  # a GPU's; how many there were is not said
    "images": round(200_000 * 128, -6),
    "average": (0.0, False),
    "critic times": ("uniform", 0.0, 1.0, None),  # transport.py, check_interval
    "student times": ("uniform", 0.0, 1.0),
    "lognormal": (0.0, 1.0),  # not used
    "classes": None,  # randint, distill_ddp.py:120: our default without real images
    "augmentation": (0.0, True),  # no images are read
    "start time": 0.5,  # distill_ddp.py:112
    "edm2": (False, True),
    "frozen": (0, 0),
    "gan": None,
}
LSG = {"m": 25.0}  # run_sid_sida_edm2.sh:164: --lsg 50
SIZES = {
    "xs": (200, 30),
    "s": (200, 80),
    "m": (200, 200),
    "l": (200, 55),
    "xl": (200, 50),
    "xxl": (100, 30),
}  # --duration
EDM2_S = {"edm2": (False, False)}  # run_sida_edm2.sh:103-104, run_sid_sida_edm2.sh: the same

PUBLISHED = {
    "cifar10/distill_sid": SID,
    "cifar10/distill_sid_cond": {**SID, "classes": "empirical", "images": 800_000_000},  # run_sid.sh:70; loop:298
    "imagenet64/distill_sid": {**SID, **IMAGENET64, "classes": "empirical", "images": 1_000_000_000},  # run_sid.sh:97
    "ffhq64/distill_sid": {**SID, **FFHQ, "student optimizer": FP16(1e-5, 0.9)},  # run_sid.sh:123
    "afhqv2-64/distill_sid": {**SID, **AFHQ, "objective": SID_OBJECTIVE(1.0)},  # run_sid.sh:129
    "cifar10/distill_sida": SIDA,
    "cifar10/distill_sida_cond": SIDA,
    "imagenet64/distill_sida": {**SIDA, **IMAGENET64},
    "ffhq64/distill_sida": {**SIDA, **FFHQ, "student optimizer": FP16(1e-5), "images": 200_000_000},  # no g_beta1 there
    "afhqv2-64/distill_sida": {**SIDA, **AFHQ, "images": 200_000_000},
    # run_sid_sida.sh: --duration 100 everywhere
    "cifar10/distill_sid2a": {**SIDA, "images": 100_000_000},
    "cifar10/distill_sid2a_cond": {**SIDA, "images": 100_000_000},
    "imagenet64/distill_sid2a": {**SIDA, **IMAGENET64, "images": 100_000_000},
    "ffhq64/distill_sid2a": {**SIDA, **FFHQ, "student optimizer": FP16(1e-5), "images": 100_000_000},
    "afhqv2-64/distill_sid2a": {**SIDA, **AFHQ, "images": 100_000_000},
    "cifar10/distill_realuid": REALUID,
    "cifar10/distill_realuid_cond": {  # run.sh:94-95
        **REALUID,
        "objective": ("realuid", (0.98, 0.96, 0.98), (0.98, 0.96, 0.98), False, "velocity"),
        "classes": "empirical",
    },
    "celeba64/distill_realuid": {
        **REALUID,
        "objective": ("realuid", (0.90, 0.88, 0.90), (0.90, 0.88, 0.90), False, "velocity"),  # run.sh:120-121
        "student optimizer": (5e-6, 0.0, 0.999, 1e-8, 0.0),  # run.sh:123
        "critic optimizer": (5e-6, 0.0, 0.999, 1e-8, 0.0),
        "batch": 64,  # run.sh:122
        "images": 1_600_000 // 6 * 64,  # run.sh:125
        "average": (0.999, False),  # README: EMA 0.999
    },
    "cifar10/distill_realuid_finetune": {
        **REALUID,
        "objective": ("realuid", (0.92, 0.86, 0.92), (0.92, 0.86, 0.92), False, "velocity"),  # run.sh:224-225
        "starts": ("teacher",),  # train_distil.py:322
        "student optimizer": (1e-5, 0.0, 0.999, 1e-8, 0.0),  # run.sh:227
        "critic optimizer": (1e-5, 0.0, 0.999, 1e-8, 0.0),
        "warm-up": (1, 1, "constant"),  # run.sh:228
    },
    "cifar10/distill_realuid_gan": {**REALUID, **REALUID_GAN},
    "cifar10/distill_realuid_cond_gan": {**REALUID, **REALUID_GAN, "classes": "empirical"},
    "imagenet64/distill_dmd2": DMD2,
    "imagenet64/distill_dmd2_no_gan": {
        **{key: value for key, value in DMD2.items() if not key.startswith("gan ")},
        "images": round(410_000 / 5 * 280, -6),
        "gan": None,
    },
    "imagenet64/distill_dmd2_finetune": {
        **DMD2,
        "starts": ("the student's run",),  # --ckpt_only_path: both networks
        "student optimizer": (5e-7, 0.9, 0.999, 1e-8, 0.01),
        "critic optimizer": (5e-7, 0.9, 0.999, 1e-8, 0.01),
        "images": round(140_000 / 5 * 280, -6),
    },
    "imagenet64/distill_dmd2_fastgen": FASTGEN,
    "imagenet256/distill_si_adistill": SI_ADISTILL,
    "imagenet256/distill_si_adistill_s2": SI_ADISTILL,
}
PUBLISHED["cifar10/distill_realuid_cond_finetune"] = {  # run.sh:248-255
    **PUBLISHED["cifar10/distill_realuid_finetune"],
    "objective": ("realuid", (0.94, 1.0, 0.94), (0.94, 1.0, 0.94), False, "velocity"),
    "classes": "empirical",
}
PUBLISHED["celeba64/distill_realuid_gan"] = {
    **PUBLISHED["celeba64/distill_realuid"],
    **REALUID_GAN,
    "gan": ("head", 3.0, 1.0, "sum", None),  # run.sh:202-203
}
for size, (duration, further) in SIZES.items():
    small = {"dropout": (0.0, 0.0)} if size in ("xs", "s") else {}  # sida_edm2_train.py:222-233
    apart = EDM2_S if size == "s" else {}
    PUBLISHED[f"imagenet512/distill_{size}"] = {**SID_EDM2, **small, "images": duration * 1_000_000}
    PUBLISHED[f"imagenet512/distill_{size}_sida"] = {**SIDA_EDM2, **small, **apart, "images": duration * 1_000_000}
    PUBLISHED[f"imagenet512/distill_{size}_sid2a"] = {
        **SIDA_EDM2, **small, **apart, "images": further * 1_000_000, "student loss": ("sid", "sum", LSG.get(size, 50.0)),
    }  # fmt: skip

#: Configs that are ours and no publication's.
OWN = {
    f"{folder}/distill" for folder in
    ("digits", "cifar10", "fashion-mnist", "fashion_inpaint", "digits_superres", "text-digits", "imagenet256",
     "imagenet256_superres")
} | {"digits/distill_four_steps", "imagenet256/distill_s2", "imagenet256/distill_freeflow_sit_xl2"}  # fmt: skip


def processes_of(name: str) -> int:
    found = re.search(r"# [\d,]+ = \d+ × \d+ × (\d+) processes", (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    text = (CONFIGS / f"{name}.yaml").read_text(encoding="utf-8")
    if found is None and "include" in text:
        parents = [parent for parent in yaml.safe_load(text).get("include", []) if parent.startswith("distill")]
        return processes_of(f"{name.rpartition('/')[0]}/{parents[0].removesuffix('.yaml')}") if parents else 1
    return int(found[1]) if found else 1


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_values_are_the_published_ones(name):
    found = resolved(read(name), processes_of(name))
    expected = PUBLISHED[name]
    assert {key: found.get(key) for key in expected} == expected


def test_every_config_is_published_or_ours():
    assert set(STUDENTS) == set(PUBLISHED) | OWN


@pytest.mark.parametrize("name", ["imagenet256/distill_si_adistill", "imagenet256/distill_si_adistill_s2"])
def test_the_reports_student_is_theirs(name):
    settings = read(name)
    assert (settings.student_map, settings.student_guidance_scale, settings.student_guidance_channels) == (
        "negative_velocity", 4.0, 3,
    )  # fmt: skip
    assert (settings.student_class_dropout_prob, settings.critic_class_dropout_prob) == (0.1, 0.1)
    assert settings.learned_positions  # distill_ddp.py:31, 89, 126: requires_grad(…, True) of every parameter
    assert (settings.guidance_scale, settings.critic_guidance_scale, settings.mixed_precision) == (1.0, 1.0, "no")


# Overlays.


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found |= flat(value, f"{prefix}{key}.") if nested else {prefix + key: value}
    return found


def named_in(recipe: str) -> set[str]:
    values = yaml.safe_load((CONFIGS / f"recipes/{recipe}.yaml").read_text(encoding="utf-8"))
    included = [file.removesuffix(".yaml") for file in values.pop("include", [])]
    return set(flat(values)).union(*(named_in(name) for name in included))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("base", STUDENTS)
def test_a_recipe_changes_what_it_names_and_nothing_else(base, recipe):
    before, after = (flat(asdict(read(*names))) for names in ((base,), (base, f"recipes/{recipe}")))
    named = named_in(recipe)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}
    coefficients = {f"objective_kwargs.{name}" for name in ("alpha", "beta", "gamma", "alpha_sid")} | {
        "objective_kwargs"
    }
    assert changed <= named | (coefficients if before["objective"] != after["objective"] else set())
    kept = ("space", "weight", "critic_weight")
    assert all(after.get(f"objective_kwargs.{key}") == before.get(f"objective_kwargs.{key}") for key in kept)


@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (("cifar10/distill_sid", "recipes/sida"), "cifar10/distill_sida"),
        (("cifar10/distill_sid", "recipes/sid2a"), "cifar10/distill_sid2a"),
        (("cifar10/distill_sida", "recipes/sid2a"), "cifar10/distill_sid2a"),
        (("imagenet64/distill_sida", "recipes/sid2a"), "imagenet64/distill_sid2a"),
        *((
            (f"imagenet512/distill_{size}", f"recipes/{kind}_edm2"), f"imagenet512/distill_{size}_{kind}")
            for size in ("xs", "l", "xl", "xxl") for kind in ("sida", "sid2a")
        ),
        (("cifar10/distill_realuid", "recipes/realuid_gan"), "cifar10/distill_realuid_gan"),
        (("cifar10/distill_realuid", "recipes/realuid_finetune"), "cifar10/distill_realuid_finetune"),
    ],
)  # fmt: skip
def test_an_overlay_over_its_base_is_the_published_recipe(names, whole):
    found, expected = resolved(read(*names), 1), resolved(read(whole), 1)
    lengths = {"batch", "images"}  # an overlay leaves these to the base
    assert {k: v for k, v in found.items() if k not in lengths} == {
        k: v for k, v in expected.items() if k not in lengths
    }


def test_dropped_coefficients_are_said(capsys):
    read("cifar10/distill_sid", "recipes/dmd2")
    note = capsys.readouterr().err
    assert "recipes/dmd2.yaml chooses objective=dmd2 instead of sid: alpha=1.2 no longer applies" in note
    assert "critic_weight=edm stays" in note
    read("cifar10/distill_sid", "recipes/sida")  # names its own alpha
    assert capsys.readouterr().err == ""
