"""Class labels of a pipeline's call: numbers or names, checked.

A copy of this file travels next to `pipeline.py` into every saved pipeline: it imports only torch.
"""

import difflib
import operator
from typing import Any

import torch

ClassLabels = int | str | list[int | str] | torch.Tensor


class LabelsMixin:
    """Needs a `network` (see `NetworkView`) and a `config` with `id2label`."""

    def prepare_labels(
        self,
        class_labels: ClassLabels | None,
        batch_size: int | None,
        device: torch.device,
        image: torch.Tensor | None = None,
        num_images_per_input: int = 1,
    ) -> tuple[torch.Tensor | None, int]:
        """
        The classes (B,) on the device, or None for an unconditional network, and the number B of images.

        Args:
            image: what `prepare_image` made of the call's `image`; there is one label for each image that was given.

        Raises:
            ValueError: for labels of an unconditional network or none of a conditional one, another number of labels than
                of images, or a `batch_size` that is no number of images.
        """
        if image is not None and batch_size is not None:
            raise ValueError("`batch_size` is the number of images given: leave it out (see `num_images_per_input`).")
        if self.network.num_classes:
            if class_labels is None or batch_size is not None:
                raise ValueError(
                    f"This network has {self.network.num_classes} classes: pass `class_labels`, one for each image, and no "
                    "`batch_size`."
                )
            labels = torch.tensor(self.get_label_ids(class_labels), device=device)
            labels = labels.repeat_interleave(num_images_per_input)
            if image is not None and len(labels) != len(image):
                given = len(labels) // num_images_per_input, len(image) // num_images_per_input
                raise ValueError(f"There are {given[0]} labels for {given[1]} images: pass one label for each image.")
            return labels, len(labels)
        if class_labels is not None:
            raise ValueError(
                "`class_labels` were given, but this network is unconditional: pass "
                f"{'`batch_size` instead' if image is None else '`image` alone'}."
            )
        if image is not None:
            return None, len(image)
        batch_size = 1 if batch_size is None else batch_size
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"`batch_size` must be a number of images, at least 1, got {batch_size!r}.")
        return None, batch_size

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        The classes that a user's labels mean.

        Args:
            class_labels (`int`, `str`, `list` of these, or integer `torch.Tensor` of shape (B,)): a string is one
                label: a name of `id2label`, or one of its comma-separated synonyms.

        Returns:
            `list[int]`: B classes, each in 0 … num_classes − 1.

        Raises:
            ValueError: for no labels, an unknown or ambiguous name, or a class out of range.
            TypeError: for a label that is neither an integer nor a string.
        """
        if hasattr(class_labels, "tolist"):  # a tensor, a NumPy array or a NumPy number
            class_labels = class_labels.tolist()
        if not isinstance(class_labels, (list, tuple, range)):
            class_labels = [class_labels]
        if not len(class_labels):
            raise ValueError("`class_labels` is empty; pass at least one label.")
        return [self._class_of_name(label) if isinstance(label, str) else self._class(label) for label in class_labels]

    def _class(self, label: Any) -> int:
        try:
            if isinstance(label, bool):  # True would be taken for class 1
                raise TypeError
            value = operator.index(label)
        except TypeError:
            raise TypeError(
                f"{label!r} of type {type(label).__name__} is no class label; labels are integers or names (a flat list "
                "or tensor of them for a batch)."
            ) from None
        num_classes = self.network.num_classes
        if num_classes == 0:
            raise ValueError(f"The class {value} was given, but this network is unconditional: leave labels out.")
        if not 0 <= value < num_classes:
            raise ValueError(f"The class {value} is out of range: this network has the classes 0 to {num_classes - 1}.")
        return value

    def _class_of_name(self, name: str) -> int:
        id2label = self.config.id2label
        if not id2label:
            raise ValueError(
                f"The label {name!r} is a name, but this pipeline has no `id2label`; pass the number of the class, 0 to "
                f"{self.network.num_classes - 1}."
            )
        whole: dict[str, list[int]] = {}
        synonyms: dict[str, list[int]] = {}
        for key, names in id2label.items():
            whole.setdefault(names.strip(), []).append(key)
            for synonym in names.split(","):
                synonyms.setdefault(synonym.strip(), []).append(key)
        found = whole.get(name.strip()) or synonyms.get(name.strip()) or []
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(
                f"The label {name!r} is the name of several classes: {', '.join(map(str, found))}. Pass the number."
            )
        close = difflib.get_close_matches(name.strip(), synonyms, n=3, cutoff=0.5)
        hint = (
            f" Did you mean {' or '.join(map(repr, close))}?" if close else f" One of them is {next(iter(synonyms))!r}."
        )
        raise ValueError(
            f"Unknown label {name!r}; `pipeline.config.id2label` names {len(id2label)} classes ({len(synonyms)} names)."
            f"{hint}"
        )


def checked_names(id2label: dict | None, num_classes: int) -> dict[int, str] | None:
    """The names with whole numbers as keys; raises ValueError for what is no class of the network, or no name."""
    if id2label is None:
        return None
    if num_classes == 0:
        raise ValueError("`id2label` names classes, but the network is unconditional: leave it out.")
    names = {}
    for key, name in id2label.items():
        try:
            number = int(key)  # JSON turns integer keys into strings
        except (TypeError, ValueError):
            raise ValueError(f"The key {key!r} of `id2label` is not the number of a class.") from None
        if not 0 <= number < num_classes or not isinstance(name, str):
            raise ValueError(
                f"`id2label` has the entry {key!r}: {name!r}; it maps classes, 0 to {num_classes - 1}, to names."
            )
        names[number] = name
    return names
