"""LoRA adapters of PEFT: teachers that share one base model in memory and differ in a few small matrices.

The base comes and goes like any teacher's weights; its layers are wrapped once, and at most one adapter is in memory, read from its file when another
teacher of that base is to score. What an adapter would change outside of the wrapped layers' products (a head, which the loss multiplies by itself; whole
modules in place of others; prompts of its own) is refused by name.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from transformers import PreTrainedModel

from rollout.errors import first_sentence
from rollout.model import head_of

if TYPE_CHECKING:
    from peft import PeftConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

SLOT = "teacher"
"""PEFT's name for the one adapter that is in memory."""

PREFIX = "base_model.model."
"""What PEFT puts before the names of weights in an adapter's file."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter's folder or hub id, its revision there, and the role of its teacher, for errors."""

    path: str
    revision: str | None
    role: str


def check_adapter(adapter: Adapter) -> None:
    """Raises ValueError where an adapter cannot be read, or does more than add to products of layers."""
    config, _ = _read(adapter)
    if config.peft_type.value != "LORA":
        raise ValueError(f"the adapter {adapter.path} of the {adapter.role} is {config.peft_type.value} and only LORA is supported: merge it into its base")
    if config.modules_to_save:
        raise ValueError(
            f"the adapter {adapter.path} of the {adapter.role} replaces whole modules ({', '.join(config.modules_to_save)}), which is not supported: "
            "merge it into its base"
        )


class AdapterSlot:
    """The place in a base model where one adapter at a time is."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.head = model, head_of(model)
        self.present: Adapter | None = None
        self.settings: dict[str, Any] | None = None
        self.is_enabled = False
        self.layers: list[BaseTunerLayer] = []

    def activate(self, adapter: Adapter | None) -> None:
        """From now on the model computes with this adapter, or without any. The base's weights have to be there.

        Raises ValueError where the adapter does not fit the model.
        """
        if adapter is not None and adapter != self.present:
            self._put(adapter)
        if (adapter is not None) != self.is_enabled:
            self.is_enabled = adapter is not None
            for layer in self.layers:
                layer.enable_adapters(self.is_enabled)
            self.model.requires_grad_(False)

    def _put(self, adapter: Adapter) -> None:
        from peft.functional import set_peft_model_state_dict

        config, weights = _read(adapter)
        config.inference_mode = True
        self.present = None
        misfit = f"the adapter {adapter.path} does not fit the base of the {adapter.role}"
        try:
            if config.to_dict() != self.settings:
                self._wrap(config)
            outcome = set_peft_model_state_dict(self.model, {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}, SLOT)
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"{misfit}: {first_sentence(error)}") from error
        if head_of(self.model) is not self.head:
            self._unwrap()
            raise ValueError(f"the adapter {adapter.path} of the {adapter.role} changes the head, which is not supported: merge it into its base")
        absent = [name for name in outcome.missing_keys if "lora_" in name] + list(outcome.unexpected_keys)
        if absent:
            raise ValueError(f"{misfit}: {absent[0]} is not in both")
        self.model.eval().requires_grad_(False)
        self.present = adapter

    def _wrap(self, config: "PeftConfig") -> None:
        """Wrap the layers that adapters of these settings add to."""
        from peft.functional import inject_adapter_in_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._unwrap()
        inject_adapter_in_model(config, self.model, SLOT)
        self.settings, self.is_enabled = config.to_dict(), True
        self.layers = [module for module in self.model.modules() if isinstance(module, BaseTunerLayer)]

    def _unwrap(self) -> None:
        """Put the base's own layers back."""
        wrapped = set(map(id, self.layers))
        for parent in list(self.model.modules()):
            for name, child in list(parent.named_children()):
                while id(child) in wrapped and id(parent) not in wrapped:
                    child = child.base_layer
                    setattr(parent, name, child)
        vars(self.model).pop("peft_config", None)
        self.settings, self.is_enabled, self.layers = None, False, []


def _read(adapter: Adapter):
    """(PEFT's config, weights) of an adapter."""
    try:
        from peft import PeftConfig
        from peft.utils import load_peft_weights
    except ImportError as error:
        raise ValueError(f"the {adapter.role} has an adapter, which needs PEFT: pip install 'opd[peft]'") from error
    if Path(adapter.path).is_absolute() or adapter.path.startswith(".") or Path(adapter.path).exists():
        if not (Path(adapter.path) / "adapter_config.json").is_file():
            raise ValueError(f"the adapter of the {adapter.role} is not at {adapter.path}: there is no adapter_config.json in that folder")
        if adapter.revision is not None:
            raise ValueError(f"the adapter of the {adapter.role} is the local folder {adapter.path}, so adapter_revision={adapter.revision} would be ignored")
    revision = {} if adapter.revision is None else {"revision": adapter.revision}
    try:
        return PeftConfig.from_pretrained(adapter.path, **revision), load_peft_weights(adapter.path, device="cpu", **revision)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ValueError(f"the adapter of the {adapter.role} cannot be loaded from {adapter.path}: {first_sentence(error)}") from error
