"""The `pop` section of vLLM's additional config."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from pop_ext.checkpoints.calibration import default_depth
from pop_ext.runtime.prefill_depth import resolve_depth


@dataclass(frozen=True)
class Settings:
    """What an engine runs with.

    prefill_depth: layers that prompt tokens run through; an int counts them, a float in (0, 1] is their share. By
        default the depth that the calibration recommends, or its only one.
    boundary_tokens, anchor_tokens: how many of a prompt's last, and of a sequence's first, run through all layers.
    calibration: a file of `pop tune` or `pop calibrate` for this model and depth; None: the layers' own weights.
    reuse_generated: prefix caching may give a later prompt the blocks of generated tokens, true keys and values of all
        layers, where it would otherwise have projected them.
    """

    prefill_depth: int | float
    boundary_tokens: int = 1
    anchor_tokens: int = 1
    calibration: str | None = None
    reuse_generated: bool = False

    @classmethod
    def read(cls, additional_config) -> Settings | None:
        """The settings in vLLM's additional config, None without a `pop` section. ValueError names what is wrong."""
        section = additional_config.get("pop") if isinstance(additional_config, dict) else None
        if section is None:
            return None
        if not isinstance(section, dict):
            raise ValueError(f"pop is {section!r:.80}, expected a table")
        known = [field.name for field in fields(cls)]
        for key in section:
            if key not in known:
                raise ValueError(f"pop has {key!r:.80}, expected of {', '.join(known)}")
        if "prefill_depth" not in section and section.get("calibration") is None:
            raise ValueError("pop has no prefill_depth, expected layers (int) or a share of them (float)")
        settings = cls(**{"prefill_depth": 1.0} | section)
        settings.check()
        if "prefill_depth" not in section:
            settings = replace(settings, prefill_depth=default_depth(settings.calibration))
        return settings

    def check(self) -> None:
        for name, least in (("boundary_tokens", 1), ("anchor_tokens", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"pop.{name} is {value!r:.80}, expected an int of {least} or more")
        if type(self.reuse_generated) is not bool:
            raise ValueError(f"pop.reuse_generated is {self.reuse_generated!r:.80}, expected true or false")
        if self.calibration is not None:
            if not isinstance(self.calibration, str):
                raise ValueError(f"pop.calibration is {self.calibration!r:.80}, expected a path")
            if not Path(self.calibration).is_file():
                raise ValueError(f"pop.calibration is {self.calibration}: no such file")

    def layers(self, num_layers: int) -> int:
        """The prefill depth P in layers, of `num_layers`. ValueError if it is no depth of theirs."""
        try:
            return resolve_depth(self.prefill_depth, num_layers)
        except (TypeError, ValueError) as error:
            raise ValueError(f"pop.{error}") from None

    def identity(self, num_layers: int) -> str:
        """What keys and values of a prompt depend on beside the tokens: blocks of other settings are other blocks."""
        values = asdict(self) | {"prefill_depth": self.layers(num_layers), "calibration": None}
        if self.calibration is not None:
            stat = Path(self.calibration).stat()
            values["calibration"] = (str(Path(self.calibration).resolve()), stat.st_size, stat.st_mtime_ns)
        return repr(values)
