"""YAML by libyaml where it is built in, which is ten times as fast: a grid may be a list of thousands of cells."""

from typing import Any

import yaml

LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def parse_yaml(content: bytes | str) -> Any:
    """The document. Raises yaml.YAMLError, and UnicodeDecodeError for bytes that are no text."""
    return yaml.load(content, Loader=LOADER)


def yaml_text(document: Any) -> str:
    """The document as text, its keys in their order."""
    return str(yaml.dump(document, Dumper=_DUMPER, sort_keys=False, allow_unicode=True))
