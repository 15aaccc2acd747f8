"""OPTModel: Megatron-core's GPTModel with OPT's positions, embedding widths and layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ..config import POSITION_OFFSET, OPTConfig
from ..core_compat import cuda_calls_stay_on_cpu
from ..parallel import ParallelContext, check_layout
from .attention import padding_mask_to_inputs
from .megatron_config import transformer_config
from .projection import ProjectedEmbedding, ProjectedOutputLayer
from .spec import block_spec


class OPTModel(GPTModel):
    """This rank's part of an OPT.

    Args:
        opt_config: the architecture.
        parallel_output: leave the logits split over the vocabulary (training does). May be set later.
    """

    def __init__(
        self,
        opt_config: OPTConfig,
        core_config: TransformerConfig,
        parallel: ParallelContext,
        *,
        parallel_output: bool = False,
    ) -> None:
        self.opt_config = opt_config  # needed by the hook below, which GPTModel's constructor calls
        super().__init__(
            config=core_config,
            transformer_layer_spec=block_spec(opt_config, core_config, parallel.device),
            vocab_size=opt_config.vocab_size,
            max_sequence_length=opt_config.num_position_rows,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=True,
        )

    def setup_embeddings_and_output_layer(self) -> None:
        """Put in OPT's own embedding and head before GPTModel ties them."""
        if self.pre_process:
            self.embedding.embedding_dropout = nn.Dropout(0.0)  # OPT drops nothing out of its embeddings
        if self.opt_config.has_embedding_projection:
            self._project_embedding()
        with cuda_calls_stay_on_cpu():
            super().setup_embeddings_and_output_layer()

    def _project_embedding(self) -> None:
        width, rows = self.opt_config.word_embed_proj_dim, self.vocab_size
        if self.pre_process:
            self.embedding.word_embeddings = ProjectedEmbedding(
                rows,
                width,
                self.config.hidden_size,
                init_method=self.config.embedding_init_method,
                config=self.config,
                tp_group=self.pg_collection.tp,
            )
        if self.post_process:
            self.output_layer = ProjectedOutputLayer(
                self.config.hidden_size,
                width,
                rows,
                config=self.config,
                init_method=self.config.init_method,
                bias=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=self.pre_process,
                tp_group=self.pg_collection.tp,
            )

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One pass.

        Args:
            input_ids: [b, s]
            position_ids: [b, s], the first token's being 0; by default they follow the attention mask.
            attention_mask: [b, s] with 0 for padding, as in transformers, or a bool mask [b, 1, s, t]
                with True where a query may look. None is causal, without padding.
            kwargs: GPTModel's, `labels` and `inference_context` among them.

        Returns:
            On the last pipeline stage logits [b, s, vocabulary], split over the tensor parallel ranks only
            if `parallel_output`; with an `inference_context` only the rows' last tokens, s = 1. On other
            stages hidden states [s, b, hidden_size].
        """
        if attention_mask is not None and attention_mask.dim() == 2:
            derived_positions, attention_mask = padding_mask_to_inputs(attention_mask)
            position_ids = derived_positions if position_ids is None else position_ids
        if position_ids is None:
            position_ids = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        gather = kwargs.get("inference_context") is not None or not self.parallel_output
        return super().forward(
            input_ids, position_ids + POSITION_OFFSET, attention_mask, runtime_gather_output=gather, **kwargs
        )

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        context = kwargs.get("inference_context")
        if context is not None and self.post_process:
            hidden_states = context.select_last(hidden_states)  # only these rows need logits
        return super()._postprocess(hidden_states, *args, **kwargs)


def build_model(
    config: OPTConfig,
    parallel: ParallelContext,
    dtype: torch.dtype,
    *,
    parallel_output: bool = False,
    **overrides: Any,
) -> OPTModel:
    """This rank's part of the model on the context's device, in evaluation mode, weights not initialised.

    Args:
        dtype: of the parameters.
        overrides: fields of TransformerConfig that differ (training).

    Raises:
        UserError: the model does not divide by the layout.
    """
    check_layout(
        config,
        parallel.tensor_model_parallel_size,
        parallel.pipeline_model_parallel_size,
        parallel.world_size,
    )
    core_config = transformer_config(config, parallel, dtype, **overrides)
    model = OPTModel(config, core_config, parallel, parallel_output=parallel_output)
    return model.to(device=parallel.device, dtype=dtype).eval()
