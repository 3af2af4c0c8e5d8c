"""What of a pipeline is trained: every weight, named parts of it, or a new LoRA; and what a KL term compares with."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fastgrpo.config.schema import Lora
from fastgrpo.errors import ConfigError, nearest

if TYPE_CHECKING:
    from fastgrpo.models.protocol import ModelFamily
LORA_FILE = "pytorch_lora_weights.safetensors"
# The adapter that model.lora.path is read into.
GIVEN = "given"
# The adapter that is trained, and that of the old policy.
TRAINED, OLD = "default", "old"


def make_trainable(family: ModelFamily) -> None:
    """Turns on the gradients of what the config trains: a new LoRA, model.trainable, or every weight.

    Raises:
        ConfigError: For names that match nothing.
    """
    config, policy = family.config, family.policy
    if config.lora:
        add_lora(family.modules.values(), config.lora, family.lora_targets)
        return
    parts = config.trainable
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(parts is None or any(f".{part}." in f".{name}." for part in parts))
    for part in parts or ():
        if not any(f".{part}." in f".{name}." for name, _ in policy.named_parameters()):
            names = sorted({p for name, _ in policy.named_parameters() for p in name.split(".")[:-1]})
            known = [name for name in names if not name.isdigit()]
            raise ConfigError(
                f"model.trainable: '{part}' matches no parameter; {nearest(part, known)}"
                f"(parts of their names: {', '.join(known)})"
            )


def add_lora(modules: Iterable[nn.Module], lora: Lora, default_targets: Sequence[str]) -> None:
    """Adds trainable float32 LoRA layers (PEFT) to frozen components. Raises ConfigError for a target without layer."""
    from peft import LoraConfig

    targets = list(lora.targets or default_targets)
    for module in modules:
        check_targets(targets, module)
        # PEFT's alpha may be any number, whatever its annotation says.
        adapter = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=targets)
        cast(Any, module).add_adapter(adapter)
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


def lora_file(modules: Iterable[str], component: str) -> str:
    """The file of a component's LoRA: the first component's has the name that pipelines look for."""
    return LORA_FILE if component == next(iter(modules)) else LORA_FILE.replace(".", f"_{component}.")


def load_lora(family: ModelFamily) -> None:
    """Puts the weights of model.lora.path into the new LoRA, if there is a path.

    The pipeline reads and converts them, as an adapter of its own, which is then copied and removed.

    Raises:
        ConfigError: For what cannot be read, has another rank, or layers that model.lora.targets does not name.
    """
    lora = family.config.lora
    if lora is None or lora.path is None:
        return
    from safetensors import SafetensorError

    path = Path(lora.path).expanduser()
    for name, module in family.modules.items():
        given: dict[str, Any] = {"adapter_name": GIVEN, "use_safetensors": True}
        if path.is_dir():
            given["weight_name"] = lora_file(family.modules, name)
            if not (path / given["weight_name"]).is_file() and len(family.modules) == 1:
                del given["weight_name"]
        if name != family.trained[0]:
            given[f"load_into_{name}"] = True
        try:
            family.pipeline.load_lora_weights(str(path) if path.exists() else lora.path, **given)
        except (OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError, SafetensorError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ConfigError(f"model.lora.path: '{lora.path}' cannot be read as a LoRA: {reason}") from None
        _adopt(module, lora, name)


@torch.no_grad()
def _adopt(module: nn.Module, lora: Lora, component: str) -> None:
    """Copies the adapter GIVEN of a component into the trained one, and removes it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers: dict[str, Any] = {n: m for n, m in module.named_modules() if isinstance(m, BaseTunerLayer)}
    given = {name: layer for name, layer in layers.items() if GIVEN in layer.lora_A}
    if not given:
        raise ConfigError(f"model.lora.path: '{lora.path}' has no layer of this model's {component}")
    for name, layer in given.items():
        rank = layer.r[GIVEN]
        if "default" not in layer.lora_A:
            raise ConfigError(f"model.lora.path: '{lora.path}' has '{name}', which model.lora.targets leaves out")
        if rank != lora.rank:
            raise ConfigError(f"model.lora.rank: {lora.rank}, but '{lora.path}' is of rank {rank}; set it to {rank}")
        layer.lora_A["default"].weight.copy_(layer.lora_A[GIVEN].weight)
        ratio = layer.scaling[GIVEN] / layer.scaling["default"]
        layer.lora_B["default"].weight.copy_(layer.lora_B[GIVEN].weight * ratio)
    tuned: Any = module
    tuned.delete_adapters(GIVEN)
    tuned.set_adapter("default")


@contextmanager
def lora_disabled(policy: nn.Module) -> Iterator[None]:
    """Within it a policy is without its LoRA: the reference model of a LoRA run."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def add_old_lora(modules: Iterable[nn.Module], lora: Lora, default_targets: Sequence[str]) -> None:
    """Adds the old policy's LoRA to components that have the trained one: another adapter, of the same weights.

    Its parameters have gradients until they are sharded (`freeze_old_lora`), so that they are sharded like the trained.
    """
    from peft import LoraConfig

    targets = list(lora.targets or default_targets)
    for module in modules:
        tuned: Any = module
        trained = {name for name, p in module.named_parameters() if p.requires_grad}
        adapter = LoraConfig(r=lora.rank, lora_alpha=cast(int, lora.alpha), target_modules=targets)
        with warnings.catch_warnings():
            # PEFT asks whether several adapters are meant.
            warnings.filterwarnings("ignore", "Already found a `peft_config`")
            tuned.add_adapter(adapter, adapter_name=OLD)
        tuned.set_adapter(TRAINED)
        named = dict(module.named_parameters())
        for name in trained:
            layer, _, leaf = old_name(name).rpartition(".")
            # In its place, not into it: in a plan the new adapter's is on the meta device.
            setattr(module.get_submodule(layer), leaf, nn.Parameter(named[name].detach().clone()))


def old_name(name: str) -> str:
    """The old policy's parameter of a trained one of a LoRA."""
    return name.replace(f".{TRAINED}.", f".{OLD}.")


def freeze_old_lora(policy: nn.Module) -> None:
    """Ends the gradients of the old policy's LoRA, once it is sharded."""
    for name, parameter in policy.named_parameters():
        if f".{OLD}." in name:
            parameter.requires_grad_(False)


@contextmanager
def lora_switched(policy: nn.Module) -> Iterator[None]:
    """Within it a policy has the old policy's LoRA in place of the trained one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in policy.modules() if isinstance(m, BaseTunerLayer)]
    for layer in layers:
        layer._active_adapter = [OLD]
    try:
        yield
    finally:
        for layer in layers:
            layer._active_adapter = [TRAINED]


Reference = Callable[[], AbstractContextManager[Mapping[str, nn.Module] | None]]


class OldPolicy:
    """The policy that a forward process compares with: a set of weights of its own, that follows the trained one.

    Calling it gives a context in which its components act, as `reference_of` does: copies, or (None) the policy's own
    with the old LoRA switched on.

    Attributes:
        parameters: Its weights, in the order of the trained parameters of the policy; DTensors stay sharded.
        modules: The copies of full fine-tuning; None with a LoRA.
    """

    def __init__(self, policy: nn.Module, modules: Mapping[str, nn.Module] | None) -> None:
        self.policy, self.modules = policy, modules
        trained = [name for name, p in policy.named_parameters() if p.requires_grad]
        if modules is None:
            named = dict(policy.named_parameters())
            self.parameters = [named[old_name(name)] for name in trained]
        else:
            whole = next(iter(modules.values())) if len(modules) == 1 else nn.ModuleDict(modules)
            named = dict(whole.named_parameters())
            self.parameters = [named[name] for name in trained]

    def __call__(self) -> AbstractContextManager[Mapping[str, nn.Module] | None]:
        return lora_switched(self.policy) if self.modules is None else nullcontext(self.modules)


def reference_of(policy: nn.Module, frozen: Mapping[str, nn.Module] | None) -> Reference:
    """What gives a KL term's reference components: frozen copies, or (None) the policy's own with its LoRA off."""
    return partial(lora_disabled, policy) if frozen is None else lambda: nullcontext(frozen)


def check_targets(targets: Sequence[str], module: nn.Module) -> None:
    """Raises ConfigError for a target that no layer of `module` ends in, with what they do end in."""
    layers = [name.split(".") for name, part in module.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    # The 0 of to_out.0 says nothing alone.
    ends = sorted({".".join(name[-2:] if name[-1].isdigit() else name[-1:]) for name in layers})
    for target in targets:
        parts = target.split(".")
        if not any(name[-len(parts) :] == parts for name in layers):
            raise ConfigError(
                f"model.lora.targets: '{target}' matches no layer; {nearest(target, ends)}"
                f"(layers end in: {', '.join(ends)})"
            )


def without_weights(config: Mapping[str, Any]) -> nn.Module:
    """The diffusers model of a config.json, on the meta device."""
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, config["_class_name"]).from_config(config)
