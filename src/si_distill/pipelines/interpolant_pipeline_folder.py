"""Pipeline folders that carry their own code, and clear errors when one cannot be opened.

A saved folder holds, next to weights and configs, `pipeline.py` with its helpers and the source of each component that is
not diffusers' own. So it loads in three ways: `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)` without
this package, the same with it, and the pipeline's class with the package and without trust.

A copy of this file travels next to `pipeline.py`: it imports only torch, diffusers and what diffusers requires.
"""

import importlib
import importlib.util
import inspect
import json
import os
import re
import shutil
import sys
import typing
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils import DIFFUSERS_DYNAMIC_MODULE_NAME
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from safetensors import safe_open

#: Libraries whose classes every loader has: they are named in the index and their code is not copied.
STOCK_LIBRARIES = ("diffusers", "transformers")
#: Types of stored tensors, in safetensors' words, that keep their values in the type that a network is run in.
STORED_TYPES = ("F64", "F32", "F16", "BF16")

# The installed package, or "" in the copy of a saved folder, which has no classes to offer but its own.
_HERE = ".pipelines.interpolant_pipeline_folder"
_PACKAGE = __name__.removesuffix(_HERE) if __name__.endswith(_HERE) else ""


class SelfContainedFolderMixin:
    """Saving and loading of a `DiffusionPipeline`, to stand before it among the base classes."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs: Any):
        """
        Opens a saved pipeline: a folder, or a repository of the Hub.

        Args:
            pretrained_model_name_or_path: the folder, or `user/name`.
            kwargs: of `DiffusionPipeline.from_pretrained`: `dtype`, `variant`, `revision`, components to use instead of
                the saved ones, …

        Raises:
            OSError: when the folder is missing, holds no pipeline, or a file of it cannot be read.
            ValueError: when it holds another pipeline, or weights that do not fit their config.
        """
        source = os.fspath(pretrained_model_name_or_path)
        _check_source(source)
        kwargs.setdefault("use_safetensors", True)  # other weight files are pickles, which run code
        try:
            if os.path.isdir(source):
                cls._check_folder(Path(source), kwargs)
            pipeline = super().from_pretrained(source, **kwargs)
        except torch.OutOfMemoryError:
            raise
        except OSError as error:
            raise OSError(
                f"{cls.__name__} cannot be loaded from {source!r}: {error} "
                + (
                    "If a file is missing or was cut short, copy, download or save the folder again."
                    if os.path.isdir(source)
                    else "There is no such folder here either: check the path, or the name and the connection."
                )
            ) from error
        except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{cls.__name__} cannot be loaded from {source!r}: {error}") from error
        for name, component in pipeline.components.items():
            if isinstance(component, torch.nn.Module) and name not in kwargs:
                check_weights(component, f"{source}/{name}", kwargs)
        return pipeline

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any):
        """
        A pipeline of this class with the components and settings of another one, which share their weights.

        Args:
            pipeline ([`DiffusionPipeline`]): the other one.
            kwargs: components and settings to use instead; `dtype` (or `torch_dtype`) casts the modules, also those that the
                other one uses.

        Raises:
            ValueError: for an argument that this class does not have, or a component that neither has.
        """
        dtype = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
        arguments = inspect.signature(cls.__init__).parameters
        unknown = kwargs.keys() - arguments.keys()
        if unknown:
            raise ValueError(
                f"{cls.__name__}.from_pipe does not take {', '.join(sorted(unknown))}; it takes "
                f"{', '.join(name for name in arguments if name != 'self')} and dtype."
            )
        given = {**pipeline.config, **pipeline.components, **kwargs}
        values = {name: given[name] for name in arguments if name in given}
        missing = [
            name for name, argument in arguments.items()
            if name not in {*values, "self"} and argument.default is inspect.Parameter.empty
        ]  # fmt: skip
        if missing:
            raise ValueError(f"A {type(pipeline).__name__} has no {' and no '.join(missing)}: pass it to from_pipe.")
        new = cls(**values)
        return new if dtype is None else new.to(dtype=dtype)

    @classmethod
    def _check_folder(cls, folder: Path, kwargs: dict[str, Any]) -> None:
        if not (folder / cls.config_name).is_file():
            raise OSError(
                f"it has no {cls.config_name}, so it is not a pipeline folder. Pass the folder that `save_pretrained` or "
                "a training run wrote, not one above or below it."
            )
        index = cls.load_config(folder)
        _check_arguments(cls, index, folder / cls.config_name)
        components = cls._component_names()
        for name, value in index.items():
            pair = (
                isinstance(value, list)
                and len(value) == 2
                and all(isinstance(part, (str, type(None))) for part in value)
            )
            if name in components and not pair:
                raise ValueError(
                    f"`{name}` in {cls.config_name} must be the pair [library, class] of a component, got {value!r}. "
                    "Restore the file, or save the pipeline again."
                )
            if name.startswith("_") or not isinstance(value, list) or value[:1] in ([], [None]) or name in kwargs:
                continue
            if not (folder / name).is_dir():
                raise OSError(f"its {cls.config_name} names the component {name!r}, but there is no folder {name}/.")
            module, class_name = value if len(value) == 2 else (None, None)
            if _PACKAGE and module in sys.modules and module.startswith(f"{_PACKAGE}."):
                component = getattr(sys.modules[module], class_name)
                config = folder / name / component.config_name
                if config.is_file():
                    values = component._dict_from_json_file(config)
                    _check_arguments(component, values, config)
                    if name == "scheduler" and "interpolant" not in values:
                        raise ValueError(
                            f"{name}/{config.name} does not say the `interpolant`, the path of the network's training. "
                            "Restore the file, or save the pipeline again."
                        )
            # diffusers looks for the variant between the dots of every entry's name.
            stray = [entry.name for entry in (folder / name).iterdir() if "." not in entry.name]
            if kwargs.get("variant") and stray:
                raise ValueError(
                    f"`variant` needs {name}/ to hold model files only; remove {', '.join(stray)} from it."
                )

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike) -> dict[str, Any]:
        """The index; where the package is installed, its class needs none of the folder's code."""
        index = super()._dict_from_json_file(json_file)
        saved = index.get("_class_name") if isinstance(index, dict) else None
        if not saved:
            raise ValueError(f"{json_file} names no pipeline class, so it is not the index of a pipeline.")
        name = saved[-1] if isinstance(saved, list) else saved
        if name not in [base.__name__ for base in cls.__mro__]:
            raise ValueError(
                f"it was saved as {name}, which samples differently. Open it with {name}.from_pretrained or, when that is "
                "not at hand, diffusers' DiffusionPipeline.from_pretrained."
            )
        if _PACKAGE:
            index["_class_name"] = name
        return index

    @classmethod
    def load_config(cls, *args: Any, **kwargs: Any):
        """The index, in which the components that the installed package has are named by its modules."""
        result = super().load_config(*args, **kwargs)
        index = result[0] if isinstance(result, tuple) else result
        for name, value in index.items():
            if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
                index[name] = [_installed_module(*value) or value[0], value[1]]
        return result

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """
        Writes the index and the code next to it; `save_pretrained` and `push_to_hub` end here.

        Raises:
            ValueError: for a component or pipeline whose source cannot travel (not in a file of its own, or importing
                from outside its folder).
        """
        folder = Path(save_directory)
        code = {
            name: (self._source(type(component), name), folder / name) for name, component in self._own_components()
        }
        pipeline_source = self._source(type(self), "")
        for source, target in code.values():
            _copy_code(source, target, source.name)
        _copy_code(pipeline_source, folder, "pipeline.py")
        for name, component in self.components.items():
            if component is not None:
                _forget_origin(folder / name / component.config_name)
                _forget_shards(folder / name)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """
        Publishes the pipeline with its code, its card, a sample grid, and what the run that it was loaded from left: what
        `pipelines/publish.py` does. One commit; a second publication updates.

        Args:
            repo_id (`str`): `user/name`.
            kwargs: `private`, `token`, `commit_message`, `create_pr`; `variant` (`"bf16"`: a further copy of the weights),
                `license` (the Hub's identifier), `teacher_repo_id` (where the teacher is published).

        Returns:
            `str`: the address of the repository, or of the pull request.

        Raises:
            ValueError: for a name, token or repository with which it cannot work.
            RuntimeError: when the Hub refuses or cannot be reached. Nothing is then published.
        """
        if not _PACKAGE:  # the copy in a saved folder has no card to write
            return super().push_to_hub(repo_id, **kwargs)
        publishing = importlib.import_module(f"{_PACKAGE}.hub.publishing")
        return publishing.publish_pipeline(self, repo_id, **kwargs).url

    def to_json_file(self, json_file_path: str | os.PathLike) -> None:
        """Writes the index in the form that names the folder's own code."""
        index = json.loads(self.to_json_string())
        index.pop("_name_or_path", None)  # a path of the machine that saved it
        index["_class_name"] = ["pipeline", type(self).__name__]
        for name, component in self._own_components():
            index[name] = [self._source(type(component), name).stem, type(component).__name__]
        Path(json_file_path).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

    @classmethod
    def _component_names(cls) -> set[str]:
        """Arguments that are modules or schedulers: `name: ModelMixin`, or with a default None."""
        kinds = typing.get_type_hints(cls.__init__)
        return {
            name for name, kind in kinds.items()
            if any(hasattr(part, "from_pretrained") for part in (kind, *typing.get_args(kind)))
        }  # fmt: skip

    def _own_components(self) -> list[tuple[str, Any]]:
        """The components whose code travels, as they were before `torch.compile` wrapped them."""
        components = [(name, getattr(value, "_orig_mod", value)) for name, value in self.components.items()]
        return [(name, value) for name, value in components if value is not None and not _is_stock(value)]

    def _source(self, cls: type, component: str) -> Path:
        """The file that defines a class of the pipeline ("") or of a component.

        The code of all folders lands in one cache, where a later folder overwrites the file of an earlier one; so a class
        that came with a folder is copied from that folder while it is there.
        """
        module = cls.__module__.split(".")
        if module[0] == DIFFUSERS_DYNAMIC_MODULE_NAME:
            origin = getattr(self.transformer.config, "_name_or_path", None)  # also where a Hub repository was unpacked
            for folder in (self.name_or_path, origin and os.path.dirname(origin)):
                file = Path(folder or "", component, module[-1] + ".py")
                if folder and file.is_file():
                    return file
        try:
            return Path(inspect.getsourcefile(cls))
        except (OSError, TypeError) as error:
            raise ValueError(
                f"The source of {cls.__name__} cannot travel with the pipeline: it is not defined in a file. Move the "
                "class into a module."
            ) from error


def _check_arguments(cls: type, values: Any, file: Path) -> None:
    """Refuses a config whose values do not have the types of the constructor's arguments, where the package is at hand."""
    if not _PACKAGE:
        return
    try:
        importlib.import_module(f"{_PACKAGE}.reading").check_arguments(cls.__init__, values)
    except ValueError as error:
        raise ValueError(
            f"{file.parent.name}/{file.name}: {error}. Restore the file, or save the pipeline again."
        ) from None


def _is_stock(component: Any) -> bool:
    return type(component).__module__.split(".")[0] in STOCK_LIBRARIES


def _installed_module(stem: str, class_name: str) -> str | None:
    """The module of the installed package that has a class which a folder brings along, imported, or None."""
    for room in ("models", "schedulers") if _PACKAGE and stem.isidentifier() else ():
        name = f"{_PACKAGE}.{room}.{stem}"
        if importlib.util.find_spec(name) is not None and hasattr(importlib.import_module(name), class_name):
            return name
    return None


def _copy_code(source: Path, folder: Path, name: str) -> None:
    """Copies a module, and the siblings it imports, into a folder."""
    names = get_relative_imports(source)
    siblings = [source.with_name(f"{sibling}.py") for sibling in names]
    for sibling in siblings:
        # The loader copies what a module imports from its own folder, one level deep.
        if not sibling.is_file() or not set(names).issuperset(get_relative_imports(sibling)):
            raise ValueError(
                f"{source.name} imports {sibling.stem!r} relatively, which cannot travel with the pipeline: it must be a "
                f"file next to it that imports relatively nothing which {source.name} does not import itself."
            )
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)  # would break `variant=`
    for file, target in [(source, folder / name), *((sibling, folder / sibling.name) for sibling in siblings)]:
        if not (target.exists() and target.samefile(file)):
            shutil.copyfile(file, target)


def _forget_origin(config_file: Path) -> None:
    """Drops the path that a component was loaded from out of its saved config."""
    if config_file.is_file():
        config = json.loads(config_file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _forget_shards(folder: Path) -> None:
    """Drops the list of an earlier save's shards, which diffusers leaves and would look for instead of the one file."""
    for index in folder.glob("*.index.json"):
        listed = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        if not all((folder / file).is_file() for file in listed.values()):
            index.unlink()


def _check_source(source: str) -> None:
    """Refuses what is neither a folder nor can be the name of a repository."""
    if os.path.isfile(source):
        raise OSError(f"{source!r} is a file; pass the pipeline folder, the one with `model_index.json` in it.")
    if not os.path.isdir(source) and not re.fullmatch(r"(?!\.)[\w.-]+(/[\w.-]+)?", source):
        raise OSError(f"There is no folder {source!r}, and it cannot be the name of a repository (`user/name`).")


def check_weights(component: torch.nn.Module, name: str, kwargs: dict[str, Any]) -> None:
    """diffusers only warns when tensors are missing, which it leaves without values, or left over; and it takes any values.

    Raises:
        ValueError: for weights that do not fit the config, are stored in a type that changes their meaning when it is cast,
            or are not finite.
    """
    if not {"device_map", "quantization_config"}.isdisjoint(kwargs):
        return  # placed on other devices, or stored under other names
    expected = component.state_dict()
    missing = {key for key, value in expected.items() if value.is_meta}
    left_over: set[str] = set()
    types = _stored_types(Path(component.config.get("_name_or_path") or ""), kwargs.get("variant"))
    stored = types.keys()
    numbers = {key for key, value in expected.items() if value.is_floating_point()}
    strange = sorted(key for key, kind in types.items() if key in numbers and kind not in STORED_TYPES)
    if strange:
        raise ValueError(
            f"The weights in {name} hold {len(strange)} tensors of a type that networks are not run in: {strange[0]} is "
            f"{types[strange[0]]}. Save them as float32, float16 or bfloat16."
        )
    # Old checkpoints of diffusers' own classes are renamed while they load.
    if stored and not _is_stock(component):
        missing |= expected.keys() - stored
        left_over = stored - expected.keys()
    for keys, what in ((missing, "are missing from its weights"), (left_over, "in its weights have no place")):
        if keys:
            some = ", ".join(sorted(keys)[:3]) + (", …" if len(keys) > 3 else "")
            raise ValueError(
                f"The weights in {name} do not fit its config.json: {len(keys)} tensors {what} ({some}). Save the pipeline "
                "again, or restore the config that belongs to these weights."
            )
    # A sum, for comparing every value would make a copy of the weights.
    damaged = [
        key for key, value in expected.items()
        if value.is_floating_point() and not value.is_meta and not value.sum(dtype=torch.float64).isfinite()
    ]  # fmt: skip
    if damaged:
        raise ValueError(
            f"The weights in {name} are damaged: {len(damaged)} tensors hold values that are not finite ({damaged[0]}, …). "
            "Copy or save them again, from before the training that left them so."
        )


def _stored_types(folder: Path, variant: str | None) -> dict[str, str]:
    """Names of the tensors in a component's safetensors files and their types; empty when it has none."""
    files = sorted(folder.glob("*.safetensors"))
    of_variant = [file for file in files if variant and file.name.split(".")[1].startswith(variant)]
    types: dict[str, str] = {}
    for file in of_variant or [file for file in files if file.name.count(".") == 1]:
        with safe_open(file, framework="pt") as tensors:
            types |= {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - not a mapping
    return types
