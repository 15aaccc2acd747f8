"""OPTModel: Megatron-core's GPTModel with OPT's positions, embedding widths and layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ..config import POSITION_OFFSET, OPTConfig
from ..errors import UserError
from ..parallel.context import ParallelContext
from ..parallel.core_compat import cuda_calls_stay_on_cpu
from ..parallel.layout import check_layout
from .attention import padding_mask_to_inputs
from .embedding import Int8Embedding, Int8ProjectedOutputLayer, OPTEmbedding, ProjectedOutputLayer
from .linear import DeferredWeight, Int8OutputLayer, OPTOutputLayer
from .lora import LoRAOptions, freeze_all_but_factors
from .megatron_config import transformer_config
from .spec import LINEAR_LAYERS, block_spec


class OPTModel(GPTModel):
    """This rank's part of an OPT.

    Args:
        opt_config: the architecture.
        parallel_output: leave the logits split over the vocabulary (training does). May be set later.
        quantization: None, or "int8" for a model of 8-bit weights that can only be run.
        lora: low-rank factors beside the linear layers, everything else being frozen.
    """

    def __init__(
        self,
        opt_config: OPTConfig,
        core_config: TransformerConfig,
        parallel: ParallelContext,
        *,
        parallel_output: bool = False,
        quantization: str | None = None,
        lora: LoRAOptions | None = None,
    ) -> None:
        # Needed by the hook below, which GPTModel's constructor calls.
        self.opt_config, self.quantization, self._device = opt_config, quantization, parallel.device
        super().__init__(
            config=core_config,
            transformer_layer_spec=block_spec(opt_config, core_config, parallel.device, quantization, lora),
            vocab_size=opt_config.vocab_size,
            max_sequence_length=opt_config.num_position_rows,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=True,
        )
        if quantization is not None:  # not earlier: core sums the tied weights over the stages
            for module in self.modules():
                if isinstance(module, DeferredWeight):
                    module.defer_weight()
        if lora is not None:
            self._train_factors_alone()

    def _train_factors_alone(self) -> None:
        freeze_all_but_factors(self)
        if self.pre_process:
            # A recomputed layer whose input needs no gradient would give its factors none either.
            self.embedding.register_forward_hook(
                lambda module, inputs, output: output.requires_grad_() if torch.is_grad_enabled() else output
            )

    def setup_embeddings_and_output_layer(self) -> None:
        """Put in OPT's own embedding and head before GPTModel ties them."""
        config, width = self.config, self.opt_config.word_embed_proj_dim
        if self.pre_process:
            self.embedding.embedding_dropout = nn.Dropout(0.0)  # OPT drops nothing out of its embeddings
            embedding = OPTEmbedding if self.quantization is None else Int8Embedding
            self.embedding.word_embeddings = embedding(
                self.vocab_size,
                width,
                config.hidden_size,
                init_method=config.embedding_init_method,
                config=config,
                tp_group=self.pg_collection.tp,
            )
        if self.post_process:
            sizes = (width, self.vocab_size)
            if self.opt_config.has_embedding_projection:
                sizes = (config.hidden_size, *sizes)
            self.output_layer = self._output_layer_class()(
                *sizes,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=self.pre_process,
                tp_group=self.pg_collection.tp,
            )
        with cuda_calls_stay_on_cpu(self._device):
            super().setup_embeddings_and_output_layer()

    def _output_layer_class(self) -> type[OPTOutputLayer]:
        # A head beside the embedding has no weight of its own that would have to be read as 8 bits.
        own_int8 = self.quantization is not None and not self.pre_process
        if self.opt_config.has_embedding_projection:
            return Int8ProjectedOutputLayer if own_int8 else ProjectedOutputLayer
        return Int8OutputLayer if own_int8 else OPTOutputLayer

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of parameters that are not quantised, also after `half()` and the like."""
        return next(parameter.dtype for parameter in self.parameters() if parameter.device.type != "meta")

    def prepare_inference(self) -> None:
        """Exchange weights for what runs fastest here (kernels.py), one layer at a time; once.

        Afterwards the model can be run, with `forward` too, but has no weights to read, train or save.
        """
        for module in self.modules():
            if isinstance(module, OPTOutputLayer) and module.product is None:
                weight = self.embedding.word_embeddings.head_weight() if self.pre_process else module.weight
                module.prepare_head(weight, quantized=self.quantization is not None)
            elif hasattr(module, "prepare_inference") and module is not self:
                module.prepare_inference()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One pass over whole sequences. (Generation goes through `inference.InferenceModel`.)

        Args:
            input_ids: [b, s]
            position_ids: [b, s], the first token's being 0; by default they follow the attention mask.
            attention_mask: [b, s] with 0 for padding, as in transformers, or a bool mask [b, 1, s, t]
                with True where a query may look. None is causal, without padding.
            kwargs: GPTModel's, `labels` among them.

        Returns:
            On the last pipeline stage logits [b, s, vocabulary], split over the tensor parallel ranks only
            if `parallel_output`. On other stages hidden states [s, b, hidden_size].
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            derived_positions, attention_mask = padding_mask_to_inputs(attention_mask)
            position_ids = derived_positions if position_ids is None else position_ids
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        return super().forward(
            input_ids,
            position_ids + POSITION_OFFSET,
            attention_mask,
            runtime_gather_output=not self.parallel_output,
            **kwargs,
        )


def build_model(
    config: OPTConfig,
    parallel: ParallelContext,
    dtype: torch.dtype,
    *,
    parallel_output: bool = False,
    quantization: str | None = None,
    lora: LoRAOptions | None = None,
    **overrides: Any,
) -> OPTModel:
    """This rank's part of the model on the context's device, in evaluation mode, weights not initialised.

    Args:
        dtype: of the parameters (with a quantisation, of those that stay as they are, and of activations).
        quantization: None or "int8".
        lora: factors to train, everything else frozen.
        overrides: fields of TransformerConfig that differ (training).

    Raises:
        UserError: the model does not divide by the layout, or there is no such quantisation.
    """
    if quantization not in LINEAR_LAYERS:
        raise UserError(f"quantization {quantization!r}: choose int8 or none")
    check_layout(
        config,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.world_size,
    )
    core_config = transformer_config(config, parallel, dtype, **overrides)
    model = OPTModel(
        config, core_config, parallel, parallel_output=parallel_output, quantization=quantization, lora=lora
    )
    return model.to(device=parallel.device, dtype=dtype).eval()
