"""Lists the configs that the package brings, by the names that `--config` takes, or says where the file of one is.

    si-distill configs
    si-distill configs --path digits/distill
    accelerate launch --config_file "$(si-distill configs --path accelerate/ddp)" -m si_distill.commands.train_distill

Those in accelerate/ are the launcher's.
"""

from dataclasses import dataclass

from ..named_configs import config_names, find_config
from ..settings import parse_settings, script_main, setting


@dataclass
class ConfigsConfig:
    path: str | None = setting(None, "The config whose file is printed, instead of the list of names.")


def main(argv: list[str]) -> None:
    path = parse_settings(ConfigsConfig, argv, __doc__).path
    print("\n".join(config_names()) if path is None else find_config(path).resolve())


if __name__ == "__main__":
    script_main(main)
