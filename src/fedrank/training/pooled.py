"""A linear head on the mean of the last hidden states over real tokens, as a class of transformers.

Exports carry a copy of this file: it needs torch and transformers alone, the latter of version 5 or newer.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput


class MeanPooledConfig(PreTrainedConfig):  # type: ignore[misc]
    """encoder: the config of the model below the head, with its model_type."""

    model_type = "mean_pooled"

    def __init__(self, encoder: dict[str, Any] | None = None, **rest: Any) -> None:
        self.encoder = dict(encoder or {})
        super().__init__(**rest)


class MeanPooledForSequenceClassification(PreTrainedModel):  # type: ignore[misc]
    config_class = MeanPooledConfig
    base_model_prefix = "encoder"
    _keep_in_fp32_modules_strict = ("head",)  # as it was trained

    def __init__(self, config: MeanPooledConfig) -> None:
        super().__init__(config)
        below = dict(config.encoder)
        self.encoder = AutoModel.from_config(AutoConfig.for_model(below.pop("model_type"), **below))
        self.head: nn.Module = nn.Linear(self.encoder.config.hidden_size, config.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **rest: Any
    ) -> SequenceClassifierOutput:
        """Logits (rows, classes) of padded rows (rows, tokens), and with labels the mean cross-entropy."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        hidden = self.encoder(input_ids=input_ids, attention_mask=mask, **rest).last_hidden_state.float()
        weight = mask[..., None].to(hidden.dtype)
        logits = self.head((hidden * weight).sum(1) / weight.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)
