"""The options of training, under Megatron-LM's names; numbers without a default come from a size's recipe."""

from __future__ import annotations

from dataclasses import dataclass

from ..options import Options, option
from .lr_schedule import DECAY_STYLES
from .recipe import INIT_STD

_DECAY_RATE = "be a number from 0 up, and below 1"


@dataclass(frozen=True)
class StartOptions(Options):
    """What a run starts from."""

    preset: str | None = option(None, help="a size of OPT's recipe (8m, 125m ... 175b), from scratch", metavar="SIZE")
    model_config: str | None = option(
        None, help="a config.json (or its directory), from scratch", metavar="FILE", is_path=True
    )
    load: str | None = option(
        None, help="fine-tune this one: any format, a name, or a repository", metavar="CHECKPOINT", is_path=True
    )
    revision: str | None = option(None, help="branch, tag or commit of a Hub repository")
    activation: str | None = option(
        None, help="state that --load has OPT's activation, where its files cannot say it", choices=("relu",)
    )
    adapter: str | None = option(
        None, help="train this adapter of peft (LoRA) further, on --load", metavar="DIR", is_path=True
    )
    tokenizer: str | None = option(
        None, help="a tokenizer (or a name) to keep beside the checkpoints", metavar="DIR", is_path=True
    )
    hidden_dropout: float | None = option(
        None,
        help="dropout of the residual branches",
        minimum=0,
        below=1,
        must="be from 0 up to 1",
        metavar="P",
        default_text="the model's",
    )
    attention_dropout: float | None = option(
        None,
        help="dropout of the attention probabilities",
        minimum=0,
        below=1,
        must="be from 0 up to 1",
        metavar="P",
        default_text="the model's",
    )
    init_method_std: float = option(
        INIT_STD, help="standard deviation of the first weights", above=0, must="be above 0", metavar="S"
    )


@dataclass(frozen=True)
class TrainerOptions(Options):
    """The size of a step, and the intervals of logging, validation and checkpoints."""

    train_iters: int = option(
        help="steps of the whole run, those before a resumption included",
        minimum=1,
        must="be positive",
        default_text="the preset's",
    )
    global_batch_size: int = option(
        help="sequences per step", minimum=1, must="be positive", metavar="G", default_text="the preset's"
    )
    seq_length: int = option(help="tokens per sequence", minimum=1, metavar="S", default_text="the model's positions")
    micro_batch_size: int = option(1, help="sequences per forward and backward pass", minimum=1, metavar="B")
    log_interval: int = option(10, help="steps between lines of progress", minimum=1)
    eval_interval: int = option(
        0, help="steps between validations", minimum=0, must="not be negative", default_text="no validation"
    )
    eval_iters: int = option(
        0,
        help="global batches in a validation",
        minimum=0,
        must="not be negative",
        default_text="all there are",
    )
    save_interval: int = option(
        0, help="steps between checkpoints", minimum=0, must="not be negative", default_text="at the end alone"
    )
    max_skipped_iters: int = option(10, help="skipped steps in a row that end a run", minimum=1)
    exit_iters: int = option(
        0,
        help="save and stop after this step",
        minimum=0,
        must="not be negative",
        default_text="never",
    )

    @property
    def num_eval_samples(self) -> int:
        """Sequences in a validation; 0 for all there are."""
        return self.eval_iters * self.global_batch_size


@dataclass(frozen=True)
class ScheduleOptions(Options):
    """The learning rate; `lr_schedule.py` computes it for each step."""

    lr: float | None = option(None, help="peak learning rate", above=0, must="be positive", default_text="the preset's")
    min_lr: float | None = option(None, help="learning rate at the end", default_text="a tenth of --lr")
    lr_warmup_iters: int | None = option(None, help="steps of linear warm-up", default_text="the preset's, else 0")
    lr_decay_style: str = option("linear", help="shape of the decay from the peak to the end", choices=DECAY_STYLES)


@dataclass(frozen=True)
class OptimizerOptions(Options):
    """Adam as in OPT's recipe, or MeZO, whose options are `MezoOptions`."""

    optimizer: str = option(
        "adam",
        help="adam, or mezo: fine-tuning by forward passes alone, in the memory of inference",
        choices=("adam", "mezo"),
    )
    weight_decay: float = option(0.1, help="weight decay of the matrices", minimum=0, must="be a number from 0 up")
    adam_beta1: float = option(0.9, help="decay rate of the mean gradient", minimum=0, below=1, must=_DECAY_RATE)
    adam_beta2: float = option(
        0.95,
        help="decay rate of the mean squared gradient",
        minimum=0,
        below=1,
        must="be a number from 0 up, and below 1",
    )
    adam_eps: float = option(1e-8, help="added to the denominator", above=0)
    clip_grad: float = option(
        1.0, help="largest L2 norm of all gradients together; 0 does not clip", minimum=0, must="be a number from 0 up"
    )
    skip_grad_norm: float = option(
        0.0,
        help="skip steps whose gradients have a larger norm; 0 skips none",
        minimum=0,
        must="be a number from 0 up",
        default_text="none",
    )
    initial_loss_scale: float = option(4.0, help="fp16: first loss scale; it is halved after an overflow", above=0)
    loss_scale_window: int = option(
        256, help="fp16: steps without an overflow after which the loss scale is doubled", minimum=1
    )
    min_loss_scale: float = option(2.0**-14, help="fp16: smallest loss scale", above=0, cli=False)
    use_distributed_optimizer: bool = option(False, help="CUDA: divide Adam's state over the data-parallel ranks")
    overlap_param_gather: bool = option(
        False, help="CUDA: gather the distributed optimizer's parameters during the next forward pass"
    )


@dataclass(frozen=True)
class MezoOptions(Options):
    """MeZO: zeroth-order fine-tuning (arXiv:2305.17333). Of Adam's options it has the learning rate alone."""

    mezo_epsilon: float = option(1e-3, help="size of the perturbations", above=0, must="be a positive number")
    objective: str = option(
        "nll",
        help="what is minimised: the negative log-likelihood of tgt, or the cross-entropy of choosing it among the "
        "candidates of each example",
        choices=("nll", "classification"),
    )


@dataclass(frozen=True)
class SavingOptions(Options):
    """What a run writes, and where."""

    save: str | None = option(
        None,
        help="directory of checkpoints, metrics.jsonl and run.yaml (the options); a run there is resumed",
        metavar="DIR",
        is_path=True,
    )
    keep_last: int = option(
        0, help="checkpoints to keep", minimum=0, must="not be negative", metavar="K", default_text="all"
    )
    no_async_save: bool = option(False, help="wait while a checkpoint is written")
    tensorboard_dir: str | None = option(None, help="write TensorBoard's files there", metavar="DIR", is_path=True)


@dataclass(frozen=True)
class ExecutionOptions(Options):
    """How the computation is divided and repeated."""

    sequence_parallel: bool = option(False, help="divide norms and dropout over the tensor parallel ranks too")
    recompute_granularity: str | None = option(
        None,
        help="recompute activations: of whole layers, or the attention's alone",
        choices=("full", "selective"),
    )
    transformer_impl: str = option(
        "local",
        help="the layers' modules: this project's, or TransformerEngine's (on a GPU, not for 350m)",
        choices=("local", "transformer_engine"),
    )
    cross_entropy_loss_fusion: bool = option(
        False, help="with --bf16: Megatron-core's fused cross-entropy, with gradients of the logits in bfloat16"
    )
    seed: int = option(1, help="seed of the first weights, of dropout and of the order of the data")


@dataclass(frozen=True)
class DeviceOptions(Options):
    """The device and the dtype."""

    bf16: bool = option(False, help="bfloat16 with float32 main parameters")
    fp16: bool = option(False, help="float16 with those and dynamic loss scaling")
    device: str | None = option(
        None, help="device to run on", choices=("cpu", "cuda"), default_text="cuda where there is one"
    )
