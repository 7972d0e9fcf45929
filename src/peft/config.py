"""Adapter configurations: dataclasses that read and write `adapter_config.json`.

The base classes know where a file comes from (folder or hub), which keys a class has, and how to name bad values.
What a method's fields mean is said once, by the string literal below each field (see `documented`). Reading a
configuration never imports or executes anything that the file names.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import json
import numbers
import os
import tempfile
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .utils.constants import CONFIG_NAME, STRUCTURE_NAME
from .utils.peft_types import PeftType, TaskType
from .utils.warning import warn

# Arguments of huggingface_hub.hf_hub_download that may come in through the loading functions.
HUB_KWARGS = (
    "subfolder",
    "revision",
    "cache_dir",
    "force_download",
    "local_files_only",
    "token",
    "proxies",
    "user_agent",
)


def split_hub_kwargs(kwargs: dict) -> tuple[dict, dict]:
    """Split `kwargs` into those of `hf_hub_download` and the others."""
    hub = {k: v for k, v in kwargs.items() if k in HUB_KWARGS and v is not None}
    return hub, {k: v for k, v in kwargs.items() if k not in HUB_KWARGS}


def write_atomically(path: str | os.PathLike, write) -> None:
    """Call `write(temporary_path)` beside `path`, then rename: nobody ever sees half a file."""
    folder, name = os.path.split(os.path.abspath(path))
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, _usual_mode())  # temporary files are private; a shared checkpoint folder is not
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@functools.cache
def _usual_mode() -> int:
    """The mode of a new file under the process's umask, which can only be read by setting it."""
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def field_docs(cls: type) -> dict[str, str]:
    """Return `{field: text}` from the string literals below the fields of `cls` and its bases."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(base):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in zip(body, body[1:]):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docs[field.target.id] = " ".join(text.value.value.split())
    return docs


class _LazyHelp(Mapping):
    """A field's metadata whose `help` is read from the class's source when somebody asks (a command line does).

    Not a dict: `dict(metadata)`, which HfArgumentParser calls, copies the contents of one without asking for them.
    """

    def __init__(self, cls: type, name: str, metadata: Mapping):
        self._cls, self._name, self._given = cls, name, metadata

    @functools.cached_property
    def _filled(self) -> dict:
        return {"help": _cached_docs(self._cls).get(self._name, ""), **self._given}

    def __getitem__(self, key):
        return self._filled[key]

    def __iter__(self):
        return iter(self._filled)

    def __len__(self) -> int:
        return len(self._filled)

    def copy(self) -> dict:  # which the metadata of ordinary fields have too
        return dict(self._filled)


_cached_docs = functools.lru_cache(maxsize=None)(field_docs)


def documented(cls: type) -> type:
    """Class decorator: let `dataclasses.fields(cls)[i].metadata["help"]` be the string below the field.

    `HfArgumentParser` and our own command line show these texts.
    """
    for field in dataclasses.fields(cls):
        field.metadata = _LazyHelp(cls, field.name, field.metadata)
    return cls


def check_types(config) -> None:
    """Check each field of a dataclass by its annotation.

    A whole number passes for a float, any sequence or set for a list, and a dict for the object that it was written
    from. What a Literal permits is left to the class, which knows the rule.

    Raises:
        TypeError: a value of another type.
    """
    for name, (kind, text) in _annotations(type(config)).items():
        if not _is_a(getattr(config, name), kind):
            raise TypeError(f"{name} must be {text}, got {getattr(config, name)!r}")


@functools.cache
def _annotations(cls: type) -> dict[str, tuple[Any, str]]:
    """`{field: (type, its text)}` of a dataclass."""
    kinds = typing.get_type_hints(cls)
    return {field.name: (kinds[field.name], str(field.type)) for field in dataclasses.fields(cls)}


def _is_a(value: Any, kind: Any) -> bool:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, one) for one in inner)
    if kind is Any or origin is Literal:
        return True
    if kind in (int, float):
        return isinstance(value, numbers.Integral if kind is int else numbers.Real) and not isinstance(value, bool)
    of = origin or kind
    if of in (list, tuple, set):
        is_one = isinstance(value, (Sequence, Set)) and not isinstance(value, (str, bytes))
        return is_one and all(_is_a(item, inner[0]) for item in value if inner)
    if of is dict:
        entry = inner or (Any, Any)
        return isinstance(value, Mapping) and all(_is_a(k, entry[0]) and _is_a(v, entry[1]) for k, v in value.items())
    return isinstance(value, (of, Mapping)) if dataclasses.is_dataclass(of) else isinstance(value, of)


@dataclass
class PeftConfigMixin:
    """Reading, writing and converting of configurations."""

    structure: ClassVar[dict | None] = None  # what DE-NAS found, which is written beside the file; no field
    from_file = False  # whether it was read from a file, and so describes an adapter that exists; no field

    task_type: str | TaskType | None = None
    """The task, one of `TaskType`; it chooses the `PeftModelFor...` class."""
    peft_type: str | PeftType | None = None
    """The method, one of `PeftType`; every configuration class sets its own."""
    auto_mapping: dict | None = None
    """Class and library of a base model that no task class covers; written for information, never imported."""
    peft_version: str | None = None
    """The version of the library that wrote the file."""

    def __post_init__(self):
        check_types(self)
        if self.task_type is not None and self.task_type not in list(TaskType):
            raise ValueError(f"task_type must be one of {[t.value for t in TaskType]} or None, got {self.task_type!r}")
        if self.peft_version is None:
            from . import __version__

            self.peft_version = __version__

    def to_dict(self) -> dict[str, Any]:
        """The configuration as a plain dict, in the key set of `adapter_config.json` and more."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def _file_dict(self) -> dict[str, Any]:
        """What goes into the file: JSON types only (sets become sorted lists, enums their values)."""
        return {key: _to_json(value) for key, value in self.to_dict().items()}

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """Write `adapter_config.json` into `save_directory`.

        Args:
            save_directory: the folder; it is created if need be.
            auto_mapping_dict: what to write as `auto_mapping`.

        Raises:
            FileExistsError: `save_directory` is a file.
            TypeError: an unknown keyword.
        """
        auto_mapping = kwargs.pop("auto_mapping_dict", None)
        if kwargs:
            raise TypeError(f"save_pretrained got unknown arguments {sorted(kwargs)}")
        if os.path.isfile(save_directory):
            raise FileExistsError(f"save_directory must be a folder, but {save_directory!r} is a file")
        os.makedirs(save_directory, exist_ok=True)
        content = self._file_dict()
        if auto_mapping is not None:
            content["auto_mapping"] = auto_mapping
        text = json.dumps(content, indent=2, sort_keys=True)

        def write(path):
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)

        write_atomically(os.path.join(save_directory, CONFIG_NAME), write)
        if self.structure is not None:
            from .tuners.denas.structure import write_structure

            write_structure(self.structure, save_directory)

    @classmethod
    def _class_and_fields(cls, content: Mapping[str, Any]) -> tuple[type, set[str]]:
        """The class that `content["peft_type"]` (or else `cls`) names, and what it can be given."""
        from .mapping import config_class

        peft_type = content.get("peft_type")
        target = config_class(peft_type) if peft_type is not None else cls
        return target, {field.name for field in dataclasses.fields(target) if field.init}

    @classmethod
    def from_peft_type(cls, **kwargs):
        """Build the configuration class that `kwargs["peft_type"]` (or else `cls`) names.

        Keys that the class does not know (a newer version wrote them) are reported and skipped.

        Raises:
            KeyError: a method that does not exist here.
        """
        target, known = cls._class_and_fields(kwargs)
        unknown = sorted(set(kwargs) - known)
        if unknown:
            writer = kwargs.get("peft_version") or "an unknown version"
            warn(
                f"{target.__name__} does not know the keys {unknown} and skips them; the file was written by peft "
                f"{writer}. If the adapter depends on them, its results will differ: update peft.",
            )
        return target(**{key: value for key, value in kwargs.items() if key in known})

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs):
        """Read `adapter_config.json` from a folder or from the hub.

        Args:
            pretrained_model_name_or_path: folder or hub id.
            subfolder: folder inside it.
            kwargs: arguments of `huggingface_hub.hf_hub_download`, and fields to overwrite. Others are passed over,
                since loaders of whole models pass theirs on (`num_labels`); what looks like a field is warned of.

        Raises:
            ValueError: there is no such file, or it is not a JSON object.
        """
        hub_kwargs, overrides = split_hub_kwargs(kwargs)
        path = find_first(pretrained_model_name_or_path, [CONFIG_NAME], subfolder=subfolder, **hub_kwargs)
        content = cls.from_json_file(path)
        if cls.__name__ not in ("PeftConfig", "PeftConfigMixin") and "peft_type" not in content:
            content["peft_type"] = cls().peft_type
        _, known = cls._class_and_fields(content)
        for name in overrides.keys() - known:
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                warn(f"from_pretrained passes {name} over: it is no field. Is {close[0]} meant?")
        overrides = {name: value for name, value in overrides.items() if name in known}
        config = cls.from_peft_type(**{**content, **overrides})
        config.from_file = True
        structure = os.path.join(os.path.dirname(path), STRUCTURE_NAME)
        if os.path.exists(structure):  # so that it stays with the adapter when this is saved again
            from .tuners.denas.structure import read_structure

            config.structure = read_structure(structure)
        return config

    @classmethod
    def from_json_file(cls, path_json_file: str | os.PathLike, **kwargs) -> dict[str, Any]:
        """Read a configuration file into a dict.

        Raises:
            ValueError: the file is not a JSON object.
        """
        if kwargs:
            raise TypeError(f"from_json_file got unknown arguments {sorted(kwargs)}")
        with open(path_json_file, encoding="utf-8") as file:
            try:
                content = json.load(file)
            except json.JSONDecodeError as error:
                raise ValueError(f"{str(path_json_file)!r} is not valid JSON: {error}") from error
        if not isinstance(content, dict):
            raise ValueError(f"{str(path_json_file)!r} must hold a JSON object, got {type(content).__name__}")
        return content

    def push_to_hub(self, repo_id: str, **kwargs) -> str:
        """Upload the configuration to the hub; see `peft.utils.hub.push_to_hub`."""
        from .utils.hub import push_to_hub

        return push_to_hub(self, repo_id, **kwargs)

    def for_model(self, model):
        """The configuration that the adapter of this model gets. One that depends on the model returns another."""
        return self

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False


@documented
@dataclass
class PeftConfig(PeftConfigMixin):
    """What every method's configuration has."""

    base_model_name_or_path: str | None = None
    """Folder or hub id of the base model, filled in from the model."""
    revision: str | None = None
    """Revision of the base model."""
    inference_mode: bool = False
    """Whether the adapter is only to be used, not trained."""


@documented
@dataclass
class PromptLearningConfig(PeftConfig):
    """What the prompt methods have in common; what describes the base model is filled in from it.

    Raises:
        ValueError: a size that is not positive.
    """

    num_virtual_tokens: int | None = None
    """Number of virtual tokens."""
    token_dim: int | None = None
    """Width of the base model's embeddings."""
    num_transformer_submodules: int | None = None
    """How many stacks get a prompt: 1, or 2 in encoder-decoders (for the task SEQ_2_SEQ_LM)."""
    num_attention_heads: int | None = None
    """Attention heads of the base model (prefix tuning: those of keys and values)."""
    num_layers: int | None = None
    """Layers of the base model."""
    modules_to_save: list[str] | None = None
    """Modules that are trained and saved whole beside the prompt."""

    def __post_init__(self):
        super().__post_init__()
        self.check_positive(
            "num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"
        )

    @property
    def is_prompt_learning(self) -> bool:
        return True

    def check_positive(self, *names: str) -> None:
        """Refuse fields that are below 1 (None is left open)."""
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def member(self, kind: type, name: str):
        """The value of a field as a member of the enumeration `kind`; it may be given in lower case."""
        value = getattr(self, name)
        text = value.value if isinstance(value, enum.Enum) else value
        if not isinstance(text, str) or text.upper() not in kind.__members__:
            raise ValueError(f"{name} must be one of {list(kind.__members__)}, got {text!r}")
        return kind[text.upper()]

    def for_model(self, model):
        """Fill in, in place, what describes the base model.

        Raises:
            ValueError: num_virtual_tokens is not given, or the model's configuration does not tell a size.
        """
        if self.num_virtual_tokens is None:
            raise ValueError(f"{type(self).__name__} needs num_virtual_tokens")
        config = getattr(model, "config", None)
        if self.num_transformer_submodules is None:
            both = self.task_type == TaskType.SEQ_2_SEQ_LM
            both = both or (self.task_type is None and getattr(config, "is_encoder_decoder", False))
            self.num_transformer_submodules = 2 if both else 1
        for name, value in self._sizes(config).items():
            if getattr(self, name) is None:
                if value is None:
                    raise ValueError(f"The base model's configuration does not tell {name}: give {name}=")
                setattr(self, name, value)
        if getattr(self, "encoder_hidden_size", 0) is None:
            self.encoder_hidden_size = self.token_dim
        return self

    def _sizes(self, config) -> dict[str, int | None]:
        """What of the fields a model's configuration tells, in the names of the various architectures."""
        config = config.get_text_config() if hasattr(config, "get_text_config") else config
        return {
            "token_dim": first_of(config, "hidden_size", "n_embd", "d_model"),
            "num_layers": first_of(config, "num_hidden_layers", "num_layers", "n_layer"),
            "num_attention_heads": first_of(
                config, "num_attention_heads", "n_head", "num_heads", "encoder_attention_heads"
            ),
        }


def first_of(config, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


def _to_json(value):
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, enum.Enum):
        return value.value
    if dataclasses.is_dataclass(value):
        return {key: _to_json(item) for key, item in dataclasses.asdict(value).items()}
    if isinstance(value, dict):
        return {key: _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    return value


def find_first(
    repo: str | os.PathLike, filenames: Sequence[str], what: str = "", *, subfolder: str | None = None, **hub_kwargs
) -> str:
    """The local path of the first of `filenames` that a folder or a hub repository has (downloaded if need be).

    Args:
        what: what they are, for the message.

    Raises:
        ValueError: it has none of them, or the hub could not be asked; the message tells which.
    """
    folder = os.path.join(repo, subfolder) if subfolder else str(repo)
    for filename in filenames:
        if os.path.isfile(local := os.path.join(folder, filename)):
            return local
    reason = None
    if not os.path.isdir(repo):
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

        for filename in filenames:
            try:
                return hf_hub_download(str(repo), filename, subfolder=subfolder, **hub_kwargs)
            except LocalEntryNotFoundError as error:
                reason = error  # offline, or no connection: another of the files may be in the cache
            except (EntryNotFoundError, HFValidationError):
                continue
    names = " or ".join(repr(name) for name in filenames)
    message = f"Can't find {f'{what} ({names})' if what else names} at {folder!r}"
    if reason is not None:
        message += f": no such folder, not in the hub's cache, and the hub could not be asked ({reason})"
    raise ValueError(message) from reason


def find_file(repo: str | os.PathLike, filename: str, *, subfolder: str | None = None, **hub_kwargs) -> str | None:
    """As `find_first` for one file that need not be there: None if it is not, or cannot be got."""
    try:
        return find_first(repo, [filename], subfolder=subfolder, **hub_kwargs)
    except ValueError:
        return None
