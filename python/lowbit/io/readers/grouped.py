"""What folders of GPTQ and of AWQ share: settings, and AutoRound, which writes the layouts of both."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from lowbit.io.foreign import quantization_config
from lowbit.io.readers.codes import group_size, integer
from lowbit.io.readers.folder import FolderReader

_AUTO_ROUND = "auto-round"


class GroupedReader(FolderReader):
    """An open folder whose layers are a qweight, and scales and zeros for groups of columns."""

    markers = ("qweight",)

    @classmethod
    def detect(cls, path: Path) -> bool:
        """By quant_method; AutoRound names the layout apart."""
        config = quantization_config(path)
        if config is not None and config.get("quant_method") == _AUTO_ROUND:
            return cls.name in str(config.get("packing_format", ""))
        return super().detect(path)

    def _settings(
        self, config: Mapping[str, Any], bits: Collection[int], layer: str = ""
    ) -> tuple[int, int | None]:
        """Bits, one of these, and group (None: the row) of a configuration, or of a layer's own."""
        try:
            return integer(config, "bits", bits), group_size(config)
        except ValueError as e:
            raise ValueError(f"{self.path}: {layer}{': ' if layer else ''}{e}") from None


def check_groups(groups: int, group: int, k: int) -> None:
    """Raises ValueError unless scales have as many groups as k columns make."""
    if groups != -(-k // group):
        raise ValueError(
            f"scales must have {-(-k // group)} groups of {group} for {k} in features, got {groups}"
        )
