"""An adapter as the file that stock pipelines load: `pipeline.load_lora_weights(folder)`."""

from dataclasses import dataclass
from pathlib import Path

from .network import TextNetwork
from .teacher import TextToImageTeacher

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"


@dataclass
class LoraWeights:
    """The adapter of a network.

    Args:
        teacher: on whose pipeline it was trained.
        network: a copy of its network that is an adapter.
    """

    teacher: TextToImageTeacher
    network: TextNetwork

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes `LORA_WEIGHTS`, in float32, as it was trained: loaders cast it to the base's precision."""
        from peft import get_peft_model_state_dict

        base, name, layers = self.network.base, self.network.adapter, self.teacher.convention.layers
        state = get_peft_model_state_dict(base, adapter_name=name)
        config = base.peft_config[name].to_dict()
        config["target_modules"] = sorted(config["target_modules"])  # JSON has no sets
        type(self.teacher.pipeline).save_lora_weights(
            folder,
            **{layers: {key: value.detach().float().cpu().contiguous() for key, value in state.items()}},
            **{layers.replace("_layers", "_adapter_metadata"): config},
        )
