"""Models as people name them: folders and hub names, adapters and their bases, dtypes in their spellings."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import torch

_DTYPES = {
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "half": torch.float16,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float64": torch.float64,
    "fp64": torch.float64,
    "double": torch.float64,
}
_WEIGHTS = ("*.safetensors", "*.bin", "*.safetensors.index.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")


def dtype_of(value: Any) -> Any:
    """A torch dtype from its spellings; `"auto"` and None stay.

    Raises:
        ValueError: an unknown one.

    Example:
        >>> dtype_of("bf16"), dtype_of("torch.float32"), dtype_of(torch.float16), dtype_of("auto")
        (torch.bfloat16, torch.float32, torch.float16, 'auto')
    """
    if value is None or isinstance(value, torch.dtype) or value == "auto":
        return value
    found = _DTYPES.get(str(value).lower().removeprefix("torch."))
    if found is None:
        raise ValueError(f"dtype={value!r} is unknown; choose one of: auto, {', '.join(_DTYPES)}.")
    return found


def loading_options(given: dict[str, Any] | None, name: str, default: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` with one `dtype`, whichever of transformers' two names it came by.

    Args:
        given: the arguments as they were given.
        name: the option that gave them, for messages.
        default: the dtype where none is named.

    Raises:
        ValueError: an unknown dtype, or two that differ.
    """
    options = dict(given or {})
    stated = {key: dtype_of(options.pop(key)) for key in ("dtype", "torch_dtype") if key in options}
    if len(set(stated.values())) > 1:
        raise ValueError(f"{name} has dtype={stated['dtype']} and torch_dtype={stated['torch_dtype']}: leave one out.")
    options["dtype"] = next(iter(stated.values()), default)
    return options


def expanded(name: str) -> str:
    """A name, or the path of a folder without `~`; a folder that is there absolute, so that what is saved finds it again."""
    path = Path(name).expanduser()
    return str(path.resolve()) if path.is_dir() else (str(path) if name[:1] == "~" else name)


def lacks_tokenizer(name: str) -> bool:
    """Whether a name is a folder without a tokenizer."""
    folder = Path(name).expanduser()
    return folder.is_dir() and not any((folder / file).is_file() for file in _TOKENIZERS)


def has_chat_template(name: str, revision: str | None = None, trust_remote_code: bool = False) -> bool:
    """Whether a model's tokenizer comes with a chat template."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        file = folder / "tokenizer_config.json"
        stated = json.loads(file.read_text()).get("chat_template") if file.is_file() else None
        return bool(stated) or any(folder.glob("chat_template*"))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError):
        return False  # whoever loads the model says what is wrong with the name
    return getattr(tokenizer, "chat_template", None) is not None


def adapter_config(name: str, revision: str | None = None) -> dict[str, Any] | None:
    """The configuration of an adapter, of a folder or on the Hub; None of anything else."""
    folder = Path(name).expanduser()
    if folder.is_dir():
        file = folder / "adapter_config.json"
        is_model = (folder / "config.json").is_file() and any(
            part for kind in _WEIGHTS for part in folder.glob(kind) if not part.name.startswith("adapter_")
        )
        return json.loads(file.read_text()) if file.is_file() and not is_model else None
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        found = find_adapter_config_file(name, revision=revision)
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with the name
    return json.loads(Path(found).read_text()) if found else None


def base_of(adapter: str, config: dict[str, Any]) -> str:
    """The base of an adapter, found from here, from the adapter's folder or from one above it.

    Raises:
        ValueError: it is not named, or a path that leads nowhere.
    """
    stated = config.get("base_model_name_or_path")
    if not stated:
        raise ValueError(
            f"the adapter {adapter} does not name its base model (base_model_name_or_path in its adapter_config.json is "
            f"{stated!r}; its student had no name when it was trained): write the base's folder or name there."
        )
    folder = Path(adapter).expanduser()
    path = Path(stated).expanduser()
    above = [] if not folder.is_dir() else [folder.resolve(), *folder.resolve().parents]
    places = [path] if path.is_absolute() else [path, *(place / path for place in above)]
    for place in places:
        if (place / "config.json").is_file():
            return str(place.resolve())
    if stated[:1] in "./~" or stated.count("/") > 1:
        looked = "there is no model there" if path.is_absolute() else f"it is neither in {Path.cwd()} nor above {folder}"
        raise ValueError(
            f"the base {stated} of the adapter {adapter} cannot be found: {looked}. Write its folder into "
            "base_model_name_or_path of adapter_config.json."
        )
    return stated


def unreadable(what: str, name: str, error: BaseException) -> ValueError:
    """What a model's name that cannot be read is told as, with the folder here that it may have meant."""
    here = [path.name for path in Path.cwd().iterdir() if (path / "config.json").is_file()]
    near = difflib.get_close_matches(name, here, n=1)
    meant = f" (but {near[0]})" if near else ""
    return ValueError(
        f"{what} {name!r} cannot be read: there is no such folder here{meant}, and of that name on the Hub: "
        f"{str(error).splitlines()[0].rstrip('.')}"
    )


def refuse_unreadable(name: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse a name of which no configuration can be read, here or on the Hub.

    Raises:
        ValueError: the name, and the folder here that it may have meant.
    """
    from transformers import AutoConfig

    adapter = adapter_config(name, revision)
    base = name if adapter is None else base_of(name, adapter)
    try:
        AutoConfig.from_pretrained(
            expanded(base), revision=revision if adapter is None else None, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ValueError) and Path(base).expanduser().is_dir():
            return  # the loader says what is wrong with it
        raise unreadable("the model" if adapter is None else f"the base of the adapter {name}", base, error) from error


def damaged_file(folder: str) -> str:
    """Which safetensors file of a folder cannot be read and why, for a message; empty where each can."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(Path(folder).expanduser().glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is damaged ({error}; {file.stat().st_size:,} bytes)"
    return ""


def refuse_missing_weights(folder: str, revision: str | None = None, trust_remote_code: bool = False) -> None:
    """Refuse a local checkpoint that lacks the weights of its language-model head, which would be random.

    Nothing is loaded: the names in its safetensors files are compared with those of an empty model.

    Raises:
        ValueError: naming them.
    """
    path = Path(folder).expanduser()
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else []
    if not files:
        return  # of the Hub, or of another format: its loader says what it lacks
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    names: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            names |= set(opened.keys())
    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or head.weight is embedding.weight or getattr(config.get_text_config(), "tie_word_embeddings", False):
        return
    wanted = next((name for name, module in model.named_modules() if module is head), "lm_head")
    if not any(name.endswith(f"{wanted.split('.')[-1]}.weight") for name in names):
        raise ValueError(
            f"the checkpoint {folder} lacks the weights of its language-model head ({wanted}.weight), which would be random: "
            "pass the checkpoint of a causal language model."
        )
