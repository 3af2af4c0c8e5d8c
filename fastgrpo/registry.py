"""Parts found by name: those built in, and those that installed packages offer by an entry point.

Entry points are read only for a name that is not built in, and none replaces a built-in part.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from fastgrpo.errors import EXTRAS, ConfigError, missing, nearest


class Registry:
    """The parts of one kind, each `module:attribute` under a name, imported when it is asked for."""

    def __init__(self, kind: str, group: str, built_in: Mapping[str, str], also: str = "") -> None:
        """Makes a registry.

        Args:
            kind: What its parts are, as an error names them: `family`, `reward`.
            group: The entry point group by which packages add theirs.
            built_in: `module:attribute` by name.
            also: What the setting takes beside a name, as an error says it: `module:Class`.
        """
        self.kind, self.group, self.built_in, self.also = kind, group, built_in, also

    def available(self) -> list[str]:
        """Every name, built in or of an installed package, sorted."""
        return sorted({*self.built_in, *(point.name for point in entry_points(group=self.group))})

    def __contains__(self, name: str) -> bool:
        return name in self.built_in or bool(entry_points(group=self.group, name=name))

    def load(self, name: str, where: str) -> Any:
        """Imports a part.

        Args:
            name: Its name.
            where: The setting that named it, for errors.

        Raises:
            ConfigError: For an unknown name, with the nearest match; for a part that fails to import, naming its
                package; for a name that two packages offer.
            UserError: Where an extra of fastgrpo is missing.
        """
        if name in self.built_in:
            module, _, attribute = self.built_in[name].partition(":")
            try:
                return getattr(importlib.import_module(module), attribute)
            except ImportError as error:
                if error.name in EXTRAS:
                    raise missing(error.name, f"{where}: {name}") from None
                raise ConfigError(f"{where}: '{name}' cannot be imported: {error}") from None
        if points := list(entry_points(group=self.group, name=name)):
            return self._of_package(points, where)
        known = self.available()
        options = ", or ".join((", ".join(known), *filter(None, [self.also])))
        raise ConfigError(f"{where}: unknown {self.kind} '{name}'; {nearest(name, known)}(one of: {options})")

    def _of_package(self, points: list[EntryPoint], where: str) -> Any:
        name, packages = points[0].name, sorted({_package(point) for point in points})
        if len({point.value for point in points}) > 1:
            raise ConfigError(
                f"{where}: the {self.kind} '{name}' is offered by the packages {' and '.join(packages)}; uninstall one"
            )
        try:
            return points[0].load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"{where}: '{name}' of the package {packages[0]} cannot be imported: {type(error).__name__}: {reason}"
            ) from None


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
