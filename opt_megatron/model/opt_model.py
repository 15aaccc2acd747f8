"""OPTModel: Megatron-core's GPTModel with OPT's positions, embedding widths and layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from ..config import POSITION_OFFSET, OPTConfig
from ..parallel.context import ParallelContext
from ..parallel.core_compat import cuda_calls_stay_on_cpu
from ..parallel.layout import check_layout
from ..parallel.memory import require_memory
from .attention import padding_mask_to_inputs
from .embedding import OPTEmbedding, ProjectedOutputLayer
from .linear import DeferredWeight, OPTOutputLayer, PackableLinear
from .linear_methods.registry import bytes_per_weight, select_method
from .lora import freeze_all_but_factors
from .lora_options import LoRALayers
from .megatron_config import transformer_config
from .spec import block_spec


class OPTModel(GPTModel):
    """This rank's part of an OPT model.

    Args:
        opt_config: the architecture.
        parallel_output: leave the logits split over the vocabulary (training does). May be set later.
        quantization: None, or the name of a linear method (linear_methods/registry.py): a model that can only be run.
        weight_dtype: of the linear weights and the embedding, where it is not that of the other parameters
            (linear_methods.registry.can_store): such a model can only be run, too.
        lora: the layers with low-rank factors, which alone are trained.
    """

    def __init__(
        self,
        opt_config: OPTConfig,
        core_config: TransformerConfig,
        parallel: ParallelContext,
        *,
        parallel_output: bool = False,
        quantization: str | None = None,
        weight_dtype: torch.dtype | None = None,
        lora: LoRALayers | None = None,
    ) -> None:
        # Needed by setup_embeddings_and_output_layer, which GPTModel's constructor calls.
        self.opt_config, self.quantization, self._device = opt_config, quantization, parallel.device
        self._weight_dtype = weight_dtype
        self._method = select_method(quantization, parallel.device, core_config.params_dtype, weight_dtype)
        super().__init__(
            config=core_config,
            transformer_layer_spec=block_spec(opt_config, core_config, parallel.device, self._method, lora or {}),
            vocab_size=opt_config.padded_vocab_size(parallel.tensor_model_parallel_size),
            max_sequence_length=opt_config.num_position_rows,
            pre_process=parallel.is_first_stage,
            post_process=parallel.is_last_stage,
            parallel_output=parallel_output,
            share_embeddings_and_output_weights=True,
        )
        if self._method.loads_deferred:  # not earlier: core sums the tied weights over the stages
            for module in self.modules():
                if isinstance(module, DeferredWeight):
                    module.defer_weight()
        if lora:
            self._train_factors_alone()

    def _train_factors_alone(self) -> None:
        freeze_all_but_factors(self)
        if self.pre_process:
            # A recomputed layer whose input needs no gradient would give its factors none either.
            self.embedding.register_forward_hook(
                lambda module, inputs, output: output.requires_grad_() if torch.is_grad_enabled() else output
            )

    def setup_embeddings_and_output_layer(self) -> None:
        """Replace core's embedding and head by OPT's, before GPTModel ties them."""
        config, width = self.config, self.opt_config.word_embed_proj_dim
        if self.pre_process:
            self.embedding.embedding_dropout = nn.Dropout(0.0)  # OPT has no dropout on its embeddings
            self.embedding.word_embeddings = OPTEmbedding(
                self.vocab_size,
                width,
                config.hidden_size,
                init_method=config.embedding_init_method,
                config=config,
                tp_group=self.pg_collection.tp,
                method=self._method,
            )
        if self.post_process:
            is_projected = self.opt_config.has_embedding_projection
            head = partial(ProjectedOutputLayer, config.hidden_size) if is_projected else OPTOutputLayer
            self.output_layer = head(
                width,
                self.vocab_size,
                num_logits=self.opt_config.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                gather_output=not self.parallel_output,
                skip_weight_param_allocation=self.pre_process,
                tp_group=self.pg_collection.tp,
                method=self._method,
            )
        with cuda_calls_stay_on_cpu(self._device):
            super().setup_embeddings_and_output_layer()

    @property
    def params_dtype(self) -> torch.dtype:
        """The dtype of parameters that are not quantised, also after `half()` and the like."""
        return self._any_parameter().dtype

    def _any_parameter(self) -> nn.Parameter:
        return next(parameter for parameter in self.parameters() if parameter.device.type != "meta")

    @property
    def is_packed(self) -> bool:
        """A linear method stores the weights of all linear layers, so that they can be run and not trained."""
        return all(module.packed is not None for module in self.modules() if isinstance(module, PackableLinear))

    def prepare_inference(self) -> None:
        """Let the linear method that is the fastest here store the weights (linear_methods/), one layer at a time.

        Afterwards the model can be run, with `forward` too, but has no linear weights to train; `weights.Weights` reads
        and writes them. The layers that are prepared already stay as they are.
        """
        like = self._any_parameter()
        method = select_method(self.quantization, like.device, like.dtype, self._weight_dtype)
        for module in self.modules():
            if isinstance(module, OPTOutputLayer) and self.pre_process:
                if module.packed is None:
                    module.prepare_tied(self.embedding.word_embeddings.head_weight(), method)
            elif isinstance(module, PackableLinear):
                module.prepare_inference(method)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """One pass over whole sequences. (Generation runs `incremental_forward.IncrementalForward`.)

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
    weight_dtype: torch.dtype | None = None,
    lora: LoRALayers | None = None,
    **overrides: Any,
) -> OPTModel:
    """This rank's part of the model on the context's device, in evaluation mode, weights not initialised.

    Args:
        dtype: of the parameters (with a quantisation, of those that stay as they are, and of activations).
        quantization: None, or one of `linear_methods.registry.quantizations()`.
        weight_dtype: as for OPTModel.
        lora: the layers with low-rank factors, which alone are trained.
        overrides: fields of TransformerConfig that differ from `transformer_config`'s (for training).

    Raises:
        UserError: the model does not divide by the layout or fit into memory, or there is no such quantisation for the
            device.
    """
    tp, pp = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    check_layout(config, tp, pp, parallel.world_size)
    itemsize = (weight_dtype or dtype).itemsize if quantization is None else bytes_per_weight(quantization)
    require_memory(int(config.num_parameters // (tp * pp) * itemsize), "the weights", parallel.device)
    core_config = transformer_config(config, parallel, dtype, **overrides)
    model = OPTModel(
        config,
        core_config,
        parallel,
        parallel_output=parallel_output,
        quantization=quantization,
        weight_dtype=weight_dtype,
        lora=lora,
    )
    return model.to(device=parallel.device, dtype=dtype).eval()
