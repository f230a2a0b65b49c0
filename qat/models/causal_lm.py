"""A causal language model of `transformers` as a LightningModule: any architecture that `AutoModelForCausalLM` knows,
from a config with random weights, or from a folder or a name on the Hub.

It trains on windows of token codes and what follows each of them; see `LanguageModel` for metrics and loss.
"""

from collections.abc import Mapping
from typing import Any, Unpack

from torch import Tensor

from qat.errors import UserError, first_line, nearest
from qat.models.classifier import Training
from qat.models.language import LanguageModel
from qat.process import imported


class CausalLM(LanguageModel):
    """A language model of `transformers`, which is its attribute `model`.

    Args:
        architecture: `model_type` (`llama`, `qwen2`, ...) and settings of its config class; of a pretrained model, what
            to change in its config.
        pretrained: A folder or a name on the Hub to take config and weights from; `None` for random weights.
        training: see `Classifier`.

    Raises:
        UserError: `transformers` is not installed, knows no such type, or refuses the settings.
    """

    def __init__(
        self,
        architecture: Mapping[str, Any] | None = None,
        pretrained: str | None = None,
        **training: Unpack[Training],
    ) -> None:
        architecture = dict(architecture or {})  # plain, as a checkpoint holds it
        model = _build(architecture, pretrained)
        super().__init__(model.config.vocab_size, **training)
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Codes of tokens [N, T], int64, to logits [N, T, V]."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def check_input(self, x: Tensor) -> None:
        """Raises a UserError unless x [N, T] fits vocabulary and window."""
        if x.ndim != 2 or x.is_floating_point():
            raise UserError(f"expected windows of token codes [N, T], got {x.dtype} of shape {list(x.shape)}")
        longest, vocabulary = self.model.config.max_position_embeddings, self.model.config.vocab_size
        if x.shape[1] > longest:
            raise UserError(
                f"model.architecture.max_position_embeddings={longest}, but the data's windows have {x.shape[1]} tokens"
            )
        if x.numel() and int(x.max()) >= vocabulary:
            raise UserError(f"model.architecture.vocab_size={vocabulary}, but the data has token code {int(x.max())}")


def _build(architecture: dict[str, Any], pretrained: str | None) -> Any:
    imported("transformers", "CausalLM needs transformers: pip install qat[transformers]")
    from transformers import AutoConfig, AutoModelForCausalLM  # pyright: ignore[reportMissingImports]
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # pyright: ignore[reportMissingImports]

    try:
        if pretrained is not None:
            return AutoModelForCausalLM.from_pretrained(pretrained, **architecture)
        kind = str(architecture.get("model_type"))
        if kind not in CONFIG_MAPPING_NAMES:
            known = nearest(kind, CONFIG_MAPPING_NAMES)
            raise UserError(f"model.architecture.model_type={kind}: transformers has no such model{known}")
        settings = {key: value for key, value in architecture.items() if key != "model_type"}
        config = AutoConfig.for_model(kind, **settings)
        if unknown := next((key for key in settings if key not in type(config)().to_dict()), None):
            known = nearest(unknown, type(config)().to_dict())
            raise UserError(f"model.architecture.{unknown}: {type(config).__name__} has no such setting{known}")
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, OSError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"model: transformers refuses it: {first_line(error)}") from None
