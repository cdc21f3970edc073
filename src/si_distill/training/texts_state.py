"""The texts of a run, which a resumed run must find as they were."""

from typing import Any

from ..errors import InputError
from ..text_to_image.texts import Texts


class TextsState:
    """Of a trainer with texts: its checkpoints say which they are. A text file or a cache can change under its name."""

    texts: Texts
    of_prompts = True

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "texts": self.texts.hash}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """
        Raises:
            InputError: when the checkpoint is of other texts.
        """
        if state["texts"] != self.texts.hash:
            raise InputError(
                "The texts of this run's data are not those that it was started with, though their place is the same: put "
                "the old ones back, or start another --output_dir."
            )
        super().load_state_dict(state)
