"""The names that settings can have, apart from the code behind them, so that `--help` need not wait for torch."""

ADVERSARIAL_KINDS = ("encoder", "head")
ADVERSARIAL_COMBINATIONS = ("sum", "mean")
#: Keys of `si_distill.critic.HEADS`.
ADVERSARIAL_HEADS = ("mlp", "dmd2", "realuid")
#: Keys of `si_distill.data.degradations.DEGRADATIONS`.
DEGRADATIONS = ("downsample", "inpaint", "blur", "greyscale", "jpeg", "edges")
LOSS_WEIGHTS = ("none", "velocity", "likelihood")
TIME_SAMPLERS = ("uniform", "logit_normal", "lognormal", "karras")
