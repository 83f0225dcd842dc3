"""What the base model's own card says and a derivative must repeat: licence, language, and whose child it is.

It is read from the README.md in the directory that the model was loaded from: a local one, or the snapshot of the Hub,
into which loading brings the README of the very commit. A GGUF file has none.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

__all__ = ["LICENCE_FILES", "read_base_card"]

LICENCE_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*")
"""Names of the files that go with a licence."""

_INHERITED = ("license", "license_name", "license_link", "language")


def read_base_card(directory: Path | None, *, hub_id: str | None) -> dict[str, Any]:
    """Those of license, license_name, license_link and language that the card gives, and base_model if there is one.

    Parameters
    ----------
    directory : where the base model's files lie, None where there are none
    hub_id : how the base model was asked for on the Hub; None if it did not come from there: a path is nobody's base
    """
    found = {name: value for name, value in _front_matter(directory).items() if name in _INHERITED and value}
    if isinstance(spoken := found.get("language"), list):  # YAML 1.1 reads Norwegian, no, as false
        found["language"] = ["no" if each is False else each for each in spoken]
    return found if hub_id is None else {"base_model": hub_id, **found}


def _front_matter(directory: Path | None) -> dict[str, Any]:
    """The card's metadata; nothing where there is no card, or one that cannot be read: then nothing is known."""
    path = directory / "README.md" if directory is not None else None
    if path is None or not path.is_file():
        return {}
    try:
        return dict(metadata_load(path) or {})
    except (ValueError, yaml.YAMLError):
        return {}
