"""`python -m opt_megatron` and `torchrun -m opt_megatron`: the same as the `opt-megatron` command."""

from .cli import main

if __name__ == "__main__":
    main()
