"""Which QConfig each module of a model has."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Mapping

from torch import nn

from torch_ext.prepare.qconfig import QConfig
from torch_ext.prepare.quantizable_modules import is_activation, target_of
from torch_ext.utils.arguments import bounded

Mapped = str | type[nn.Module]
_ATTRIBUTE = "qconfig"


class QConfigMapping:
    """The QConfig of every module of a model.

    A module's QConfig is the first of: its attribute ``qconfig``; its name in ``mapping`` (exact
    names before patterns); its type in ``mapping`` (subclasses before bases); its parent's.
    """

    def __init__(
        self,
        who: str,
        model: nn.Module,
        mapping: Mapping[Mapped, QConfig | None] | None,
        captures: bool = False,
    ) -> None:
        """Assigns the QConfigs, for the function ``who`` that errors name.

        Args:
            who: the function.
            model: the model.
            mapping: as in ``prepare_qat``.
            captures: whether the forward is captured; outputs of activations are not quantized
                then.

        Raises:
            TypeError: ``mapping`` or one of its entries, or an attribute, has a wrong type.
            ValueError: a name matches no module, no module has a QConfig, or a module that appears
                under two names has two of them and something of it may be quantized.
        """
        self._who = who
        self._captures = captures
        self._names: dict[str, QConfig | None] = {}
        self._types: dict[type[nn.Module], QConfig | None] = {}
        self._assigned: dict[str, QConfig | None] = {}
        self._explicit: set[str] = set()
        self._read(model, mapping)
        self._assign(model, "", None)
        if not any(self._assigned.values()):
            raise ValueError(
                f"{who}: expected a qconfig on the model, on a submodule or in mapping, found none"
            )
        self._check_conflicts(model)

    def of(self, name: str) -> QConfig | None:
        """The QConfig of the module of that name; None leaves it float."""
        return self._assigned[name]

    def chosen(self, name: str) -> bool:
        """Whether the mapping has this module's exact name or its type, so not by a pattern."""
        return name in self._explicit

    def _read(self, model: nn.Module, mapping: Mapping[Mapped, QConfig | None] | None) -> None:
        if mapping is not None and not isinstance(mapping, Mapping):
            raise TypeError(
                f"{self._who}: expected mapping to be a mapping, got {bounded(mapping)}"
            )
        known = [name for name, _ in model.named_modules(remove_duplicate=False)]
        for key, config in (mapping or {}).items():
            self._check(f"mapping[{key!r}]", config)
            if isinstance(key, str):
                if not any(fnmatch.fnmatchcase(name, key) for name in known):
                    near = difflib.get_close_matches(key, known, 3) or known[:20]
                    raise ValueError(
                        f'{self._who}: no module is named "{key}" as in mapping; '
                        f"known: {', '.join(filter(None, near))}"
                    )
                self._names[key] = config
            elif isinstance(key, type) and issubclass(key, nn.Module):
                self._types[key] = config
            else:
                raise TypeError(
                    f"{self._who}: expected keys of mapping to be names or module types, "
                    f"got {bounded(key)}"
                )

    def _check(self, where: str, config: object) -> None:
        if config is None or isinstance(config, QConfig):
            return
        hint = ""
        if type(config).__name__ == "QConfig":  # torch.ao's, or another package's of that name
            hint = (
                f", which is {type(config).__module__}'s: take torch_ext.get_default_qconfig(), "
                'or QConfig(functools.partial(FakeQuantize, observer="percentile"), ...)'
            )
        raise TypeError(
            f"{self._who}: expected {where} to be a torch_ext.QConfig or None, got "
            f"{bounded(config)}{hint}"
        )

    def _assign(self, module: nn.Module, name: str, inherited: QConfig | None) -> None:
        config = self._config_of(module, name, inherited)
        self._assigned[name] = config
        for child_name, child in module._modules.items():  # shared ones under each of their names
            if child is None:
                continue
            self._assign(child, f"{name}.{child_name}" if name else child_name, config)

    def _config_of(self, module: nn.Module, name: str, inherited: QConfig | None) -> QConfig | None:
        if hasattr(module, _ATTRIBUTE):
            config: QConfig | None = getattr(module, _ATTRIBUTE)
            self._check(f"{name}.{_ATTRIBUTE}".strip("."), config)
            return config
        if name in self._names:
            self._explicit.add(name)
            return self._names[name]
        for pattern, config in self._names.items():
            if fnmatch.fnmatchcase(name, pattern):
                return config
        for kind in type(module).__mro__:
            if kind in self._types:
                self._explicit.add(name)
                return self._types[kind]
        return inherited

    def _is_quantized(self, module: nn.Module, name: str) -> bool:
        """Whether something of the module may be quantized; its children are looked at by name."""
        if self.chosen(name) and self.of(name) is not None:
            return True
        if self._captures:  # then a QConfig also counts for what other modules read and call
            return not is_activation(module)
        return target_of(module) is not None

    def _check_conflicts(self, model: nn.Module) -> None:
        """Raises ValueError if a module that appears under several names has several QConfigs."""
        first: dict[int, str] = {}
        for name, module in model.named_modules(remove_duplicate=False):
            earlier = first.setdefault(id(module), name)
            if self._assigned[name] is self._assigned[earlier]:
                continue
            if self._is_quantized(module, earlier) or self._is_quantized(module, name):
                raise ValueError(
                    f'{self._who}: "{earlier}" and "{name}" are one module, '
                    "but have different qconfigs"
                )
