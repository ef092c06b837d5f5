"""Which objects touch: robosuite's `check_contact`, without its Python loop over contacts and names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


class ContactCheck:
    """Stands in for `env.check_contact`: same arguments, same answer, one array comparison."""

    def __init__(self, env) -> None:
        self._data = env.sim.data._data
        self._geom_id = env.sim.model.geom_name2id
        self._geom_count = env.sim.model.ngeom
        self._masks: dict[tuple[str, ...], np.ndarray] = {}

    def __call__(self, geoms_1, geoms_2=None) -> bool:
        """True when a geom of the first group touches one of the second (any other geom when that is None)."""
        pairs = self._data.contact.geom
        first = self._mask(geoms_1)[pairs]
        if geoms_2 is None:
            return bool(first.any())
        second = self._mask(geoms_2)[pairs]
        return bool((first & second[:, ::-1]).any())

    def _mask(self, geoms) -> np.ndarray:
        """(ngeom,) membership; `geoms` is a geom's name, a list of names, or a model with `contact_geoms`."""
        names: Sequence[str] = (geoms,) if isinstance(geoms, str) else getattr(geoms, "contact_geoms", geoms)
        key = tuple(names)
        if key not in self._masks:
            mask = np.zeros(self._geom_count, dtype=bool)
            mask[[self._geom_id(name) for name in key]] = True
            self._masks[key] = mask
        return self._masks[key]
