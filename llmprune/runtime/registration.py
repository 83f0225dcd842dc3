"""Making `quant_method: "llmprune"` known to transformers, as soon as both are there.

`import_hook.py` calls `register` when transformers has been imported, which may be by the plugin itself: reading a
configuration back from a pickle begins with it. The plugin is then only half there, and calls again at its end.
"""

from __future__ import annotations

__all__ = ["METHOD", "register"]

METHOD = "llmprune"
"""The `quant_method` in config.json."""


def register() -> None:
    """Enter our classes; a second time, the newer ones take the place."""
    from llmprune.runtime import transformers_plugin as plugin

    if not hasattr(plugin, "LlmpruneQuantizer"):
        return
    from transformers.quantizers import auto

    auto.AUTO_QUANTIZATION_CONFIG_MAPPING.pop(METHOD, None)
    auto.AUTO_QUANTIZER_MAPPING.pop(METHOD, None)
    auto.register_quantization_config(METHOD)(plugin.LlmpruneConfig)
    auto.register_quantizer(METHOD)(plugin.LlmpruneQuantizer)
