"""Certificates as a lab makes them for its server and its robots, good ones and others."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path

import trustme


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A certificate and its key, as PEM files."""

    cert: Path
    key: Path


class Authority:
    """Signs certificates; everything lies in a folder of its own.

    ca: its own certificate.
    """

    def __init__(self, folder: Path):
        self._folder, self._authority = folder, trustme.CA()
        self.ca = folder / "ca.pem"
        self._authority.cert_pem.write_to_path(str(self.ca))

    def pair(self, name: str, *, expired: bool = False) -> Pair:
        """For a host name or an address."""
        yesterday = datetime.now(timezone.utc) - timedelta(days=1)
        signed = self._authority.issue_cert(name, not_after=yesterday if expired else None)
        stem = f"{name}-{'expired' if expired else 'good'}"
        pair = Pair(cert=self._folder / f"{stem}.pem", key=self._folder / f"{stem}.key")
        signed.cert_chain_pems[0].write_to_path(str(pair.cert))
        signed.private_key_pem.write_to_path(str(pair.key))
        return pair
