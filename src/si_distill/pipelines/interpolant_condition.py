"""All that a network is told besides the state and the time.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace

import torch


@dataclass(frozen=True, eq=False)
class Condition:
    """
    What a network is told besides (x_t, t). All tensors have B rows; None is not told.

    Args:
        labels (`torch.LongTensor` of shape (B,), *optional*): classes; unconditional networks ignore them.
        text (`dict[str, torch.Tensor]` of (B, …)): embeddings of a prompt, by the names of the network's arguments.
        image (`torch.Tensor` of shape (B, C', H, W), *optional*): seen next to x_t: a bridge's x1, another picture, and the
            noise of a bridge's student (see `NetworkView.condition_image`).
        augment (`torch.Tensor` of shape (B, A), *optional*): what augmentation did to the images behind x_t.
        guidance (`torch.Tensor` of shape (B,), *optional*): the scale that a guidance-distilled network is told.
    """

    labels: torch.Tensor | None = None
    text: dict[str, torch.Tensor] = field(default_factory=dict)
    image: torch.Tensor | None = None
    augment: torch.Tensor | None = None
    guidance: torch.Tensor | None = None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Condition":
        """The condition with `function` applied to each tensor."""
        return Condition.merge(lambda value: function(*value), self)

    def __getitem__(self, rows: torch.Tensor | slice) -> "Condition":
        return self.map(lambda value: value[rows])

    @staticmethod
    def cat(*conditions: "Condition") -> "Condition":
        """The rows of conditions that are told the same things, one after the other."""
        return Condition.merge(torch.cat, *conditions)

    @staticmethod
    def merge(function: Callable[[list[torch.Tensor]], torch.Tensor], *conditions: "Condition") -> "Condition":
        """`function` of each thing's tensors in `conditions`; what the first is not told stays untold."""

        def merged(values: list) -> object:
            if isinstance(values[0], dict):
                return {name: function([value[name] for value in values]) for name in values[0]}
            return None if values[0] is None else function(values)

        names = [each.name for each in fields(Condition)]
        return Condition(*(merged([getattr(condition, name) for condition in conditions]) for name in names))

    def nulled(self, null: "Condition", where: torch.Tensor | None = None) -> "Condition":
        """Without class and text: those of `null`, which has one row, instead; the rest stays.

        Args:
            where (`torch.BoolTensor` of shape (B,), *optional*): in which rows; all when not given.
        """

        def blank(value: torch.Tensor, empty: torch.Tensor) -> torch.Tensor:
            rows = torch.ones(len(value), dtype=torch.bool, device=value.device) if where is None else where
            return torch.where(rows.view(-1, *[1] * (value.ndim - 1)), empty.to(value), value)

        text = {name: blank(value, null.text[name]) for name, value in self.text.items()}
        return replace(self, labels=None if self.labels is None else blank(self.labels, null.labels), text=text)
